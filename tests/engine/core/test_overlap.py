"""Steps that overlap, rule by rule: what is planned beside a step in flight, what waits, what comes too late."""

from __future__ import annotations

import random

import pytest
from support.fake_core import STOP_ID, FakeCore, add_request, prompt_of, undisturbed

from aiexport_edge.engine.core.protocol import AddRequest, FinishReason, Priority
from aiexport_edge.engine.core.request import Status

rng = random.Random()


@pytest.fixture(autouse=True)
def _same_prompts_in_any_order() -> None:
    rng.seed(8)


def planned(core: FakeCore) -> dict[int, int]:
    """Tokens of the plan launched last by handle."""
    return {chunk.request.handle: chunk.num_tokens for model in core.plan.models for chunk in model.chunks}


def ends_by_stop(num_prompt: int = 5, max_tokens: int = 60) -> tuple[AddRequest, int]:
    """A request whose output ends with a stop id, and how long that output is."""
    while True:
        message = add_request(1, prompt_of(rng, num_prompt), max_tokens=max_tokens, stop_ids=[STOP_ID])
        output, reason = undisturbed(message)
        if reason is FinishReason.END_TURN and len(output) > 6:
            return message, len(output)


def test_the_next_step_is_launched_before_the_ids_of_this_one_are_there() -> None:
    core = FakeCore(overlaps=True)
    core.add(add_request(1, prompt_of(rng, 5), max_tokens=4))
    assert core.step().tokens == [], "launched, nothing to collect yet"
    for _ in range(3):
        assert len(core.step().tokens) == 1, "of the step before"
        assert len(core.runner.in_flight) == 1
        assert planned(core) == {1: 1}
    assert [f.reason for f in core.step().finished] == [FinishReason.MAX_TOKENS]
    assert not core.pipeline.busy
    core.check_outputs()


def test_a_budget_that_ends_takes_no_step_in_vain() -> None:
    core = FakeCore(overlaps=True, max_step_tokens=64)
    for handle in range(4):
        core.add(add_request(handle, prompt_of(rng, 5), max_tokens=1 + handle))
    core.run()
    assert [core.replies[handle].steps for handle in range(4)] == [1, 2, 3, 4]
    assert dict(core.runner.num_drawn) == {handle: 1 + handle for handle in range(4)}


def test_a_stop_is_seen_a_step_late_and_its_extra_token_is_nowhere() -> None:
    core = FakeCore(overlaps=True)
    message, length = ends_by_stop()
    core.add(message)
    reports = [core.step() for _ in range(length + 1)]
    assert reports[-1].finished, "with the report of the step that drew the stop"
    assert core.replies[1].ids == undisturbed(message)[0]
    (flight,) = core.runner.in_flight
    (late,) = flight.pieces
    assert late.request.status is Status.FINISHED
    assert core.pool.num_used == len(late.request.pages) > 0, "the launched step may still write to them"
    report = core.step()
    assert (report.tokens, report.finished, report.started) == ([], [], [])
    assert core.pool.num_used == 0
    assert core.runner.num_drawn[1] == length + 1
    assert core.scheduler.num_output_tokens == [length]
    assert not core.pipeline.busy


def test_a_stop_that_is_seen_at_once_costs_nothing_where_steps_do_not_overlap() -> None:
    core = FakeCore()
    message, length = ends_by_stop()
    core.add(message)
    core.run()
    assert core.runner.num_drawn[1] == core.num_steps == length


def test_pages_of_an_aborted_request_go_back_when_its_step_is_over() -> None:
    core = FakeCore(overlaps=True, num_pages=5)
    core.add(add_request(1, prompt_of(rng, 12), max_tokens=4))
    core.step()
    core.abort(1)
    core.add(add_request(2, prompt_of(rng, 12), max_tokens=4))
    core.step()
    assert 2 not in planned(core), "there was no room yet"
    core.step()
    assert 2 in planned(core)
    core.run()
    core.check_outputs()


def test_nobody_is_preempted_beside_a_step_in_flight() -> None:
    core = FakeCore(overlaps=True, num_pages=9, max_step_tokens=64)
    for handle in range(3):
        core.add(add_request(handle, prompt_of(rng, 7), max_tokens=16))
    preemptions = 0
    while core.pipeline.busy:
        in_flight = bool(core.runner.in_flight)
        core.step()  # the harness asserts that no step in flight uses a page that another is given
        if core.scheduler.num_preemptions > preemptions:
            assert not in_flight
        preemptions = core.scheduler.num_preemptions
    assert preemptions > 0
    core.check_outputs()


def test_interactive_takes_its_place_from_batch_once_nothing_is_in_flight() -> None:
    core = FakeCore(overlaps=True, max_num_running=2, max_step_tokens=64)
    for handle in range(2):
        core.add(add_request(handle, prompt_of(rng, 8), max_tokens=30, priority=Priority.BATCH))
    core.step()
    core.step()
    core.add(add_request(2, prompt_of(rng, 8), max_tokens=2))
    steps = 0
    while 2 not in planned(core):
        core.step()
        steps += 1
    assert steps <= 3
    core.run()
    core.check_outputs()


def test_a_step_on_probation_overlaps_nothing() -> None:
    core = FakeCore(overlaps=True, max_step_tokens=8)
    core.add(add_request(1, prompt_of(rng, 5), max_tokens=30))
    core.step()
    core.step()
    core.add(add_request(2, prompt_of(rng, 20), max_tokens=5, probation=True))
    alone = 0
    while core.pipeline.busy:
        core.step()
        if core.runner.in_flight and core.runner.in_flight[0].pieces[0].request.probation:
            alone += 1
            assert len(core.runner.in_flight[0].pieces) == 1
            launched = core.plan
            core.step()
            assert core.plan is launched, "nothing is launched beside it"
    assert alone == 3
    core.check_outputs()


def test_a_prompt_is_computed_in_chunks_that_overlap() -> None:
    core = FakeCore(overlaps=True, num_pages=60, max_step_tokens=10)
    core.add(add_request(1, prompt_of(rng, 45), max_tokens=3))
    sizes = []
    while core.pipeline.busy:
        before = core.plan
        core.step()
        if core.plan is not before:
            sizes.append(planned(core))
    assert sizes == [{1: 10}] * 4 + [{1: 5}, {1: 1}, {1: 1}]
    core.check_outputs()


def test_constrained_draws_wait_for_what_comes_before_them() -> None:
    """The harness asserts it of every draw; the steps overlap all the same."""
    core = FakeCore(overlaps=True, tokens_per_page=[4, 3], max_step_tokens=64)
    for handle in range(6):
        message = add_request(handle, prompt_of(rng, 5), model=handle % 2, max_tokens=9, stop_ids=[STOP_ID])
        core.add(message, constrained=handle % 3 > 0)
    core.step()
    while core.scheduler.requests:
        assert core.runner.in_flight
        core.step()
    core.run()
    core.check_outputs()


def test_overlapping_takes_hardly_more_steps_than_not() -> None:
    steps = {}
    for overlaps in (False, True):
        rng.seed(4)
        core = FakeCore(num_pages=100, max_step_tokens=64, overlaps=overlaps)
        for handle in range(8):
            core.add(add_request(handle, prompt_of(rng, 9), max_tokens=20))
        core.run()
        steps[overlaps] = core.num_steps
    assert steps[True] <= steps[False] + 1
