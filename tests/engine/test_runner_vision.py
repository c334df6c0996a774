"""Qwen3-VL through the real scheduler, encoder and runner, against transformers: the same logits, the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support.driver import GREEDY
from support.fake_accelerator import FakeAccelerator
from support.fake_core import FakeSuspects
from support.tiny_models import prompts
from support.tiny_vision import Prompt, greedy_vision, make_vision, picture, prompt, save_vision

from aiexport_edge.engine.core.loading import make_runner
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pictures import Pictures
from aiexport_edge.engine.core.pipeline import Pipeline
from aiexport_edge.engine.core.protocol import AddRequest, CoreConfig, Priority, pack_ids
from aiexport_edge.engine.core.request import Request, make_request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.step_sampler import PendingStep
from aiexport_edge.engine.models.loader import load_model

NUM_TOKENS = 64
PAGE = 16 * 4 * 2 * 2 * 16 * 4  # 16 tokens


@dataclass
class Core:
    """Scheduler, pipeline and runner without a process."""

    runner: Runner
    scheduler: Scheduler
    pipeline: Pipeline[PendingStep]
    logits: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def add(self, given: Prompt, *, num_tokens: int = NUM_TOKENS, output: Sequence[int] = (), salt: bytes = b"") -> int:
        handle = len(self.requests)
        message = AddRequest(
            handle=handle,
            model=0,
            prompt_ids=pack_ids(given.ids),
            output_ids=pack_ids(list(output)),
            max_tokens=num_tokens,
            stop_ids=[],
            sampling=GREEDY,
            tenant=f"tenant-{handle % 2}",
            weight=1.0,
            salt=salt,
            priority=Priority.INTERACTIVE,
            images=given.images,
        )
        self.requests.append(make_request(message, arrival=handle, merge_size=self.scheduler.pictures.merge_size(0)))
        self.logits[handle] = []
        self.scheduler.add(self.requests[-1])
        return handle

    def run(self) -> None:
        while self.pipeline.busy:
            self.pipeline.advance()
            for handle, logits in self.runner.last_logits.items():
                self.logits[handle].append(logits.clone())
            self.scheduler.pool.check()
            self.scheduler.pictures.check()

    def output(self, handle: int) -> list[int]:
        request = self.requests[handle]
        return request.token_ids[request.num_prompt_tokens :]


def core_of(
    directory: Path,
    *,
    deterministic: bool = False,
    overlaps: bool = False,
    max_step_tokens: int = 40,
    num_pages: int = 200,
) -> Core:
    model = load_model(directory, dtype="float32", deterministic=deterministic)
    config = CoreConfig([], "cpu", PAGE, num_pages * PAGE, 8, max_step_tokens, 1, 0.0)
    accelerator = FakeAccelerator(free=4 << 30) if overlaps else None
    runner = make_runner(config, [model], torch.device("cpu"), accelerator, keep_logits=True)
    scheduler = Scheduler(
        PagePool(runner.num_pages),
        revisions=["a"],
        tokens_per_page=runner.tokens_per_page,
        max_num_running=8,
        max_step_tokens=max_step_tokens,
        batch_floor_share=0.0,
        pictures=Pictures(runner.eyes, capacity_bytes=runner.picture_bytes),
    )
    return Core(runner, scheduler, Pipeline(scheduler=scheduler, runner=runner, suspects=FakeSuspects()))


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_vl_moe"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def conversations() -> list[Prompt]:
    hello, question, again, only = prompts([7, 12, 20, 33], vocabulary=380)
    return [
        prompt(hello, picture((12, 8)), question),
        prompt(picture((4, 4)), hello, picture((16, 10)), picture((2, 24)), question),
        prompt(hello, picture((8, 20)), question, hello, again, hello),  # a picture of an earlier turn
        prompt(only),
    ]


@pytest.fixture(scope="module")
def expected(directory: Path, conversations: list[Prompt]) -> list[tuple[list[int], torch.Tensor]]:
    model = make_vision(directory.name)
    return [greedy_vision(model, directory, given, NUM_TOKENS) for given in conversations]


@pytest.mark.parametrize(
    ("deterministic", "overlaps", "max_step_tokens"),
    [(False, False, 512), (False, False, 40), (True, False, 40), (False, True, 40)],
    ids=["whole", "cut", "deterministic", "overlapping"],
)
def test_tokens_and_logits_are_those_of_transformers(
    directory: Path,
    conversations: list[Prompt],
    expected: list[tuple[list[int], torch.Tensor]],
    deterministic: bool,
    overlaps: bool,
    max_step_tokens: int,
) -> None:
    core = core_of(directory, deterministic=deterministic, overlaps=overlaps, max_step_tokens=max_step_tokens)
    handles = [core.add(given) for given in conversations]
    core.run()
    for handle, (ids, logits) in zip(handles, expected, strict=True):
        assert core.output(handle) == ids
        if not overlaps:
            torch.testing.assert_close(torch.stack(core.logits[handle]), logits, rtol=0, atol=1e-4)
    assert core.scheduler.pool.num_used == 0


def test_a_picture_seen_before_is_found_again_and_another_of_its_size_is_not(directory: Path) -> None:
    model = make_vision(directory.name)
    before, after = prompts([6, 30], vocabulary=380)
    first, other = picture((8, 16), seed=1), picture((8, 16), seed=2)
    core = core_of(directory)
    cached = []
    for given, salt in [
        (prompt(before, first, after), b""),
        (prompt(before, first, after[:9]), b""),
        (prompt(before, other, after), b""),
        (prompt(before, first, after), b"another workspace"),
    ]:
        handle = core.add(given, num_tokens=16, salt=salt)
        core.run()
        assert core.output(handle) == greedy_vision(model, directory, given, 16)[0]
        cached.append(core.requests[handle].num_cached_tokens)
    # 6 tokens, 34 of the picture with its start and end, 9 after it: three pages of 16.
    assert cached == [0, 48, 0, 0]


def test_page_famine_and_beginnings_in_common_change_no_token(directory: Path) -> None:
    model = make_vision(directory.name)
    beginning, *questions = prompts([10, 5, 9, 14, 20, 7, 3], vocabulary=380)
    shared = picture((12, 12), seed=3)
    given = [
        prompt(beginning, shared, question, picture((4 + 2 * index, 8))) for index, question in enumerate(questions)
    ]
    given[-1] = prompt(questions[-1])
    core = core_of(directory, num_pages=24)
    handles = [core.add(each, num_tokens=40) for each in given]
    core.run()
    assert core.scheduler.num_preemptions > 0
    assert sum(core.requests[handle].num_cached_tokens for handle in handles) > 0
    for handle, each in zip(handles, given, strict=True):
        assert core.output(handle) == greedy_vision(model, directory, each, 40)[0]


def test_a_reply_goes_on_where_an_earlier_attempt_stopped(
    directory: Path, conversations: list[Prompt], expected: list[tuple[list[int], torch.Tensor]]
) -> None:
    core = core_of(directory, max_step_tokens=64)
    handles = [
        core.add(given, output=ids[: 5 + 20 * index])
        for index, (given, (ids, _)) in enumerate(zip(conversations[:3], expected, strict=False))
    ]
    core.run()
    assert [core.output(handle) for handle in handles] == [ids for ids, _ in expected[:3]]


def test_deterministic_logits_do_not_depend_on_chunks_neighbours_or_hits(
    directory: Path, conversations: list[Prompt]
) -> None:
    seen = []
    for max_step_tokens, alone in ((512, True), (40, False), (23, False)):
        core = core_of(directory, deterministic=True, max_step_tokens=max_step_tokens)
        handle = core.add(conversations[1], num_tokens=12)
        for given in [] if alone else conversations:
            core.add(given, num_tokens=12)
        core.run()
        again = core.add(conversations[1], num_tokens=12)
        core.run()
        assert core.requests[again].num_cached_tokens > 0
        seen += [torch.stack(core.logits[handle]), torch.stack(core.logits[again])]
    assert all(torch.equal(logits, seen[0]) for logits in seen[1:])
