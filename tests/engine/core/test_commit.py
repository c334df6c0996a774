"""When a request ends, what counts as its output, and what is reported of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_core import NUM_IDS, STOP_ID, FakeCore, add_request, prompt_of, undisturbed

from aiexport_edge.engine.core.commit import commit, end_of
from aiexport_edge.engine.core.fairness import OUTPUT_COST
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.plan import StepResult
from aiexport_edge.engine.core.protocol import Finished, FinishReason, Priority, StepReport, Tokens
from aiexport_edge.engine.core.request import make_request
from aiexport_edge.engine.core.scheduler import Scheduler

PROMPT = [20, 21, 22]


def scheduler() -> Scheduler:
    return Scheduler(
        PagePool(30),
        revisions=["r"],
        tokens_per_page=[4],
        max_num_running=4,
        max_step_tokens=32,
        batch_floor_share=0.1,
    )


def after(ids: list[int], *, max_tokens: int = 10, stop_ids: list[int] | None = None) -> tuple[Scheduler, StepReport]:
    """One request whose first step brings `ids`."""
    core = scheduler()
    core.add(make_request(add_request(1, PROMPT, max_tokens=max_tokens, stop_ids=stop_ids), arrival=0))
    return core, commit(core, core.plan(), StepResult({1: ids}))


@pytest.mark.parametrize(
    ("ids", "max_tokens", "kept", "reason"),
    [
        ([1], 10, [1], None),
        ([1, 2, 3], 10, [1, 2, 3], None),
        ([1, 2, 3], 3, [1, 2, 3], FinishReason.MAX_TOKENS),
        ([1, 2, 3], 2, [1, 2], FinishReason.MAX_TOKENS),
        ([9], 10, [9], FinishReason.END_TURN),
        ([1, 9, 3], 10, [1, 9], FinishReason.END_TURN),
        ([1, 8, 9], 10, [1, 8], FinishReason.END_TURN),
        ([1, 9], 2, [1, 9], FinishReason.END_TURN),
        ([1, 2, 9], 2, [1, 2], FinishReason.MAX_TOKENS),
        ([9], 1, [9], FinishReason.END_TURN),
    ],
)
def test_ids_past_the_end_are_dropped(
    ids: list[int], max_tokens: int, kept: list[int], reason: FinishReason | None
) -> None:
    core, report = after(ids, max_tokens=max_tokens, stop_ids=[8, 9])
    assert report.tokens == [Tokens(1, kept)]
    assert report.finished == ([] if reason is None else [Finished(1, reason)])
    assert core.num_output_tokens == [len(kept)]
    assert core.ranking.queues[Priority.INTERACTIVE].counter.counter("tenant") == len(PROMPT) + OUTPUT_COST * len(kept)
    assert (core.pool.num_used == 0) == (reason is not None)


def test_dropped_ids_are_never_hashed() -> None:
    core, _ = after([5, 9, 6, 6, 6, 6, 6], stop_ids=[9])
    assert core.pool.num_cached == 0, "three tokens were computed, which fill no page"
    for handle, ids in ((2, [5, 9, 6, 6, 6]), (3, [5, 6])):
        request = make_request(add_request(handle, PROMPT + ids), arrival=handle)
        core.add(request)
        core.plan()
        assert request.num_cached_tokens == 0


def test_only_computed_pages_are_published() -> None:
    core = scheduler()
    request = make_request(add_request(1, list(range(7)), max_tokens=9), arrival=0)
    core.add(request)
    commit(core, core.plan(), StepResult({1: [1]}))
    assert request.num_published_pages == 1, "eight tokens, seven of them computed"
    commit(core, core.plan(), StepResult({1: [1]}))
    assert request.num_published_pages == 2
    core.pool.check()


def test_started_is_told_once() -> None:
    core = scheduler()
    request = make_request(add_request(1, list(range(40)), max_tokens=9), arrival=0)
    core.add(request)
    first = commit(core, core.plan(), StepResult({}))
    assert [s.handle for s in first.started] == [1]
    assert first.tokens == []
    second = commit(core, core.plan(), StepResult({1: [1]}))
    assert second.started == []
    core.admission.preempt(request)
    third = commit(core, core.plan(), StepResult({1: [1]}))
    assert third.started == []
    assert core.num_prompt_tokens == [40]


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ([], None),
        ([1, 2], None),
        ([1, 2, 3, 4], FinishReason.MAX_TOKENS),
        ([1, 2, 3, 4, 5], FinishReason.MAX_TOKENS),
        ([9], FinishReason.END_TURN),
        ([1, 9, 3], FinishReason.END_TURN),
        ([1, 2, 3, 9], FinishReason.END_TURN),
        ([1, 2, 3, 4, 9], FinishReason.MAX_TOKENS),
    ],
)
def test_forced_ids_may_have_ended_a_request_already(output: list[int], reason: FinishReason | None) -> None:
    message = add_request(1, [9, 9], output=output, max_tokens=4, stop_ids=[9])
    assert end_of(make_request(message, arrival=0)) is reason


def test_no_budget_is_an_end() -> None:
    assert end_of(make_request(add_request(1, PROMPT, max_tokens=0), arrival=0)) is FinishReason.MAX_TOKENS


def test_forced_ids_are_not_reported_again() -> None:
    rng = random.Random(1)
    message = add_request(0, prompt_of(rng, 9), max_tokens=12)
    output = undisturbed(message)[0]
    for count in range(13):
        core = FakeCore(num_pages=100)
        prompt = list(memoryview(message.prompt_ids).cast("I"))
        core.add(add_request(0, prompt, output=output[:count], max_tokens=12))
        core.run()
        assert core.replies[0].ids == output[count:]
        assert core.scheduler.num_output_tokens == [12 - count]


@settings(max_examples=100, deadline=None)
@given(
    guess_rate=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    num_prompt=st.integers(1, 12),
    max_tokens=st.integers(1, 30),
    stops=st.sets(st.integers(0, NUM_IDS - 1), max_size=4),
)
def test_several_ids_a_step_equal_one(guess_rate: float, num_prompt: int, max_tokens: int, stops: set[int]) -> None:
    core = FakeCore(guess_rate=guess_rate, max_step_tokens=24)
    prompt = prompt_of(random.Random(num_prompt), num_prompt)
    for handle in range(3):
        core.add(add_request(handle, prompt[handle:] or [STOP_ID], max_tokens=max_tokens, stop_ids=sorted(stops)))
    core.run()
    core.check_outputs()


def test_faulty_logits_end_a_request_and_nobody_finds_its_pages() -> None:
    core = scheduler()
    prompt = list(range(9))
    core.add(make_request(add_request(1, prompt), arrival=0))
    core.add(make_request(add_request(2, [30] * 9), arrival=1))
    report = commit(core, core.plan(), StepResult({1: [0], 2: [4]}, frozenset({1})))
    assert report.finished == [Finished(1, FinishReason.FAULTY)]
    assert report.tokens == [Tokens(2, [4])]
    assert core.num_output_tokens == [1]
    core.pool.check()
    again = [
        make_request(add_request(handle, [*ids, 5]), arrival=handle) for handle, ids in ((3, prompt), (4, [30] * 9))
    ]
    for request in again:
        core.add(request)
    core.plan()
    assert [request.num_cached_tokens for request in again] == [0, 8]


def test_a_fault_is_seen_a_step_late_like_any_end() -> None:
    core = scheduler()
    request = make_request(add_request(1, PROMPT), arrival=0)
    core.add(request)
    first, second = core.plan(), core.plan()
    assert commit(core, first, StepResult({1: [0]}, frozenset({1}))).finished == [Finished(1, FinishReason.FAULTY)]
    assert core.pool.num_used == 1
    assert commit(core, second, StepResult({1: [0]}, frozenset({1}))) == StepReport([], [], [])
    assert core.pool.num_used == 0
