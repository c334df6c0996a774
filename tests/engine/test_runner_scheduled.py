"""The real scheduler, page pool, pipeline and runner together, in a pool so small that requests push each other out:
steps one by one as on a CPU, and overlapping as on a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.driver import GREEDY, load_runner
from support.fake_accelerator import FakeAccelerator
from support.fake_core import FakeSuspects, FakeTaken, add_request
from support.tiny_models import greedy, make, prompts, save

from aiexport_edge.engine.core.loading import make_runner
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pipeline import Pipeline
from aiexport_edge.engine.core.protocol import AddRequest, CoreConfig, FinishReason, Priority, Sampling, pack_ids
from aiexport_edge.engine.core.request import Request, make_request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.models.loader import load_model

NUM_TOKENS = 48
# 38 pages of 16 tokens for twelve requests of 5 to 10 pages each.
POOL_BYTES = 38 * 16 * 3 * 2 * 2 * 24 * 4


def runner_of(directories: Sequence[Path], *, overlaps: bool, drafts: bool = False) -> Runner:
    if not overlaps:
        return load_runner(*directories, max_num_running=8, pool_bytes=POOL_BYTES, drafts=drafts)
    models = [load_model(path, dtype="float32") for path in directories]
    config = CoreConfig([], "cuda:0", 0, POOL_BYTES, 8, 40, 1, 0.0, drafts=drafts)
    return make_runner(config, models, torch.device("cpu"), FakeAccelerator(free=4 << 30))


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
def test_page_famine_and_prefix_hits_change_no_token(overlaps: bool, drafts: bool, tmp_path: Path) -> None:
    """Nor do drafts, which untrained models give occasion for: they soon repeat themselves."""
    names = ["qwen3", "mistral_window"]
    directories = [save(name, tmp_path / name) for name in names]
    runner = runner_of(directories, overlaps=overlaps, drafts=drafts)
    assert runner.num_pages == 38
    assert runner.overlaps == overlaps
    scheduler = Scheduler(
        PagePool(runner.num_pages),
        revisions=names,
        tokens_per_page=runner.tokens_per_page,
        max_num_running=8,
        max_step_tokens=40,
        batch_floor_share=0.05,
        draft_cost=runner.draft_cost,
    )
    beginnings = prompts([40, 33, 70, 52])
    requests = []
    for handle in range(12):
        model, prompt = handle % 2, beginnings[handle % 4] + [handle + 3] * (1 + handle // 4)
        message = AddRequest(
            handle=handle,
            model=model,
            prompt_ids=pack_ids(prompt),
            output_ids=b"",
            max_tokens=NUM_TOKENS,
            stop_ids=[],
            sampling=GREEDY,
            tenant=f"tenant-{handle % 3}",
            weight=1.0,
            salt=b"one for all",
            priority=Priority(handle % 5 == 4),
        )
        requests.append(make_request(message, arrival=handle))
        scheduler.add(requests[-1])
    pipeline = Pipeline(scheduler=scheduler, runner=runner, suspects=FakeSuspects())
    while pipeline.busy:
        pipeline.advance()
    assert scheduler.num_preemptions > 0
    assert (sum(scheduler.num_accepted_tokens) > 0) == drafts
    assert sum(request.num_cached_tokens for request in requests) > 0
    models = [make(name) for name in names]
    for request in requests:
        prompt = request.token_ids[: request.num_prompt_tokens]
        expected, _ = greedy(models[request.model], prompt, NUM_TOKENS)
        assert request.token_ids[request.num_prompt_tokens :] == expected


class Multiples:
    """Allows multiples of the output's length, counted from 2."""

    def __init__(self) -> None:
        self.length = 2

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        bits = np.arange(32 * len(row)) % self.length == 0
        row[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def advance(self, drawn: Sequence[int]) -> FakeTaken:
        assert all(i % (self.length + n) == 0 for n, i in enumerate(drawn))
        self.length += len(drawn)
        return FakeTaken(list(drawn))

    def fill_ahead(self, rows: npt.NDArray[np.int32], draft: Sequence[int]) -> int:
        length = self.length
        for row in rows:
            self.fill(row)
            self.length += 1
        self.length = length
        return next((n for n, i in enumerate(draft, 1) if i % (length + n - 1)), len(rows))

    def forced_ids(self) -> list[int]:
        """Not forced, but for greedy requests no bad guesses."""
        return [6 * self.length, self.length + 1, 0]


def constrained_outputs(directories: Sequence[Path], *, overlaps: bool, drafts: bool = False) -> list[list[int]]:
    """Of six requests of two models, every other one with a constraint, sampled and greedy."""
    runner = runner_of(directories, overlaps=overlaps, drafts=drafts)
    scheduler = Scheduler(
        PagePool(runner.num_pages),
        revisions=["a", "b"],
        tokens_per_page=runner.tokens_per_page,
        max_num_running=8,
        max_step_tokens=20,
        batch_floor_share=0.0,
        draft_cost=runner.draft_cost,
    )
    requests: list[Request] = []
    for handle, prompt in enumerate(prompts([9, 30, 4, 12, 5, 21])):
        message = AddRequest(
            handle=handle,
            model=handle % 2,
            prompt_ids=pack_ids(prompt),
            output_ids=b"",
            max_tokens=12,
            stop_ids=[],
            sampling=Sampling(0.8 * (handle % 4 < 2), 0.95, 0, handle),
            tenant="",
            weight=1.0,
            salt=b"",
            priority=0,
        )
        requests.append(make_request(message, arrival=handle))
        if handle % 3:
            requests[-1].constraint = Multiples()
        scheduler.add(requests[-1])
    pipeline = Pipeline(scheduler=scheduler, runner=runner, suspects=FakeSuspects())
    while pipeline.busy:
        pipeline.advance()
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def test_constrained_requests_draw_under_their_masks(tmp_path: Path) -> None:
    directories = [save(name, tmp_path / name) for name in ("qwen3", "llama2")]
    expected = constrained_outputs(directories, overlaps=False)
    assert constrained_outputs(directories, overlaps=True) == expected
    for overlaps in (False, True):
        assert constrained_outputs(directories, overlaps=overlaps, drafts=True) == expected
    for handle, ids in enumerate(expected):
        assert len(ids) == 12
        assert all(i % (2 + n) == 0 for n, i in enumerate(ids)) == bool(handle % 3)


@pytest.mark.parametrize("overlaps", [False, True])
def test_logits_that_are_not_numbers_fail_their_request_alone(overlaps: bool, tmp_path: Path) -> None:
    """A damaged row of the embedding: whoever has that token fails, soon or when it comes."""
    runner = runner_of([save("qwen3", tmp_path)], overlaps=overlaps, drafts=True)
    embedding = runner._models[0].decoder.embedding
    assert embedding is not None
    embedding[7] = float("nan")
    scheduler = Scheduler(
        PagePool(runner.num_pages),
        revisions=["a"],
        tokens_per_page=runner.tokens_per_page,
        max_num_running=8,
        max_step_tokens=40,
        batch_floor_share=0.0,
        draft_cost=runner.draft_cost,
    )
    for handle, prompt in enumerate([[5, 6, 8], [5, 7, 8], [9, 9, 7], [9, 4]]):
        scheduler.add(make_request(add_request(handle, prompt, max_tokens=3), arrival=handle))
    pipeline = Pipeline(scheduler=scheduler, runner=runner, suspects=FakeSuspects())
    reasons: dict[int, int] = {}
    told: set[int] = set()
    while pipeline.busy:
        report = pipeline.advance()
        if report is not None:
            reasons |= {finished.handle: finished.reason for finished in report.finished}
            told |= {tokens.handle for tokens in report.tokens}
    assert reasons == {
        0: FinishReason.MAX_TOKENS,
        1: FinishReason.FAULTY,
        2: FinishReason.FAULTY,
        3: FinishReason.MAX_TOKENS,
    }
    assert told == {0, 3}
    assert scheduler.pool.num_used == 0
