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
from aiexport_edge.engine.core.runner import PendingStep, Runner
from aiexport_edge.engine.core.scheduler import Scheduler
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
