"""The scheduler's rules one by one, on requests whose whole fate is known."""

from __future__ import annotations

import random

import pytest
from support.fake_core import STOP_ID, FakeCore, add_request, prompt_of, undisturbed

from aiexport_edge.engine.core.fairness import OUTPUT_COST
from aiexport_edge.engine.core.protocol import FinishReason, Priority
from aiexport_edge.engine.core.request import Status

rng = random.Random()


@pytest.fixture(autouse=True)
def _same_prompts_in_any_order() -> None:
    rng.seed(3)


def planned(core: FakeCore) -> dict[int, int]:
    """Tokens of the last step by handle, in the order of the plan."""
    return {chunk.request.handle: chunk.num_tokens for model in core.plan.models for chunk in model.chunks}


def test_a_prompt_is_computed_in_chunks_beside_decodes() -> None:
    core = FakeCore(max_step_tokens=10)
    core.add(add_request(1, prompt_of(rng, 5), max_tokens=20))
    core.step()
    core.add(add_request(2, prompt_of(rng, 25), max_tokens=3))
    sizes = []
    for _ in range(4):
        core.step()
        sizes.append(planned(core))
    assert sizes == [{1: 1, 2: 9}, {1: 1, 2: 9}, {1: 1, 2: 7}, {1: 1, 2: 1}]
    core.run()
    core.check_outputs()


def test_models_share_a_step_and_the_pool() -> None:
    core = FakeCore(tokens_per_page=[4, 7, 1], num_pages=60, max_step_tokens=64)
    for handle in range(6):
        core.add(add_request(handle, prompt_of(rng, 8), model=handle % 3))
    core.step()
    assert [(plan.model, len(plan.chunks)) for plan in core.plan.models] == [(0, 2), (1, 2), (2, 2)]
    assert core.pool.num_used == 2 * 2 + 2 * 2 + 2 * 8
    core.run()
    core.check_outputs()


def test_decodes_come_first_in_each_models_chunks() -> None:
    core = FakeCore(max_step_tokens=64)
    core.add(add_request(1, prompt_of(rng, 5)))
    core.step()
    core.add(add_request(2, prompt_of(rng, 5)))
    core.step()
    assert list(planned(core)) == [1, 2]


def test_one_tenants_requests_start_in_order_of_arrival() -> None:
    core = FakeCore(max_num_running=2)
    for handle in range(6):
        core.add(add_request(handle, prompt_of(rng, 9), max_tokens=4))
    started = []
    while core.scheduler.requests:
        started += [s.handle for s in core.step().started]
    assert started == list(range(6))


def test_tenants_take_turns_whatever_the_order_of_arrival() -> None:
    core = FakeCore(max_num_running=1)
    for handle in range(6):
        core.add(add_request(handle, prompt_of(rng, 8), max_tokens=4, tenant="first"))
    for handle in range(6, 9):
        core.add(add_request(handle, prompt_of(rng, 8), max_tokens=4, tenant="second"))
    tenants = []
    while core.scheduler.requests:
        tenants += [core.replies[s.handle].message.tenant for s in core.step().started]
    assert tenants[:6] == ["first", "second"] * 3


def test_interactive_goes_before_batch() -> None:
    core = FakeCore(max_num_running=1, batch_floor_share=0.0)
    core.add(add_request(0, prompt_of(rng, 8), max_tokens=2))
    core.add(add_request(1, prompt_of(rng, 8), max_tokens=2, priority=Priority.BATCH))
    core.add(add_request(2, prompt_of(rng, 8), max_tokens=2))
    started = []
    while core.scheduler.requests:
        started += [s.handle for s in core.step().started]
    assert started == [0, 2, 1]


def test_interactive_takes_its_place_from_batch() -> None:
    core = FakeCore(max_num_running=2, max_step_tokens=64)
    for handle in range(2):
        core.add(add_request(handle, prompt_of(rng, 8), max_tokens=20, priority=Priority.BATCH))
    core.step()
    core.add(add_request(2, prompt_of(rng, 8), max_tokens=2))
    report = core.step()
    assert [s.handle for s in report.started] == [2]
    assert set(planned(core)) == {0, 2}, "the batch request that came last has made room"
    assert core.scheduler.requests[1].status is Status.PREEMPTED
    core.run()
    core.check_outputs()


def test_interactive_takes_pages_from_batch_only_where_that_suffices() -> None:
    core = FakeCore(num_pages=11, max_step_tokens=64)
    core.add(add_request(0, prompt_of(rng, 20), max_tokens=15))
    core.add(add_request(1, prompt_of(rng, 8), max_tokens=8, priority=Priority.BATCH))
    core.step()
    core.add(add_request(2, prompt_of(rng, 28), max_tokens=2))  # 7 pages of 10, and 5 are interactive
    core.step()
    assert set(planned(core)) == {0, 1}, "nobody is preempted in vain"
    core.run()
    core.check_outputs()


def test_batch_keeps_its_share_of_a_busy_core() -> None:
    core = FakeCore(max_num_running=2, max_step_tokens=16, batch_floor_share=0.2)
    handle = 0
    for _ in range(5):
        core.add(add_request(handle, prompt_of(rng, 8), max_tokens=100, priority=Priority.BATCH))
        handle += 1
    served = {Priority.INTERACTIVE: 0, Priority.BATCH: 0}
    for _ in range(2000):
        while core.scheduler.num_waiting < 8:
            core.add(add_request(handle, prompt_of(rng, 8), max_tokens=10))
            handle += 1
        if core.scheduler.ranking.num_batch < 3:
            core.add(add_request(handle, prompt_of(rng, 8), max_tokens=100, priority=Priority.BATCH))
            handle += 1
        for tokens in core.step().tokens:
            served[Priority(core.replies[tokens.handle].message.priority)] += len(tokens.ids)
    share = served[Priority.BATCH] / sum(served.values())
    assert 0.15 < share < 0.35
    done = [r for r in core.replies.values() if r.message.priority is Priority.BATCH and r.reason is not None]
    assert len(done) >= 3
    for reply in done:
        assert reply.output == undisturbed(reply.message)[0]


def test_a_batch_request_of_the_whole_pool_gets_its_turn() -> None:
    """Interactive requests would keep some pages for ever; once batch is overdue they are no longer admitted."""
    core = FakeCore(num_pages=21, max_num_running=6, max_step_tokens=8, batch_floor_share=0.2)
    core.add(add_request(0, prompt_of(rng, 60), max_tokens=20, priority=Priority.BATCH))
    handle = 1
    while core.replies[0].reason is None:
        while core.scheduler.num_waiting < 4:
            core.add(add_request(handle, prompt_of(rng, 8), max_tokens=8))
            handle += 1
        core.step()
        assert core.num_steps < 3000
    assert core.replies[0].output == undisturbed(core.replies[0].message)[0]


def test_preemption_leaves_full_pages_to_be_found_again() -> None:
    core = FakeCore(num_pages=17, max_step_tokens=64)
    core.add(add_request(0, prompt_of(rng, 24), max_tokens=36))
    core.add(add_request(1, prompt_of(rng, 24), max_tokens=36))
    while not core.scheduler.num_preemptions:
        core.step()
    victim = core.scheduler.requests[1]
    assert victim.status is Status.PREEMPTED
    computed = len(victim.token_ids)
    core.run()
    core.check_outputs()
    # 0 needs 15 pages of 16, so up to 15 of the victim's tokens' pages were taken; the front of it was still there.
    assert victim.num_charged_tokens >= computed
    assert core.scheduler.num_preemptions == 1


def test_two_that_do_not_fit_together_take_turns_without_thrashing() -> None:
    core = FakeCore(num_pages=21, max_step_tokens=64)
    for handle, tenant in enumerate(("a", "b")):
        core.add(add_request(handle, prompt_of(rng, 8), max_tokens=70, tenant=tenant))
    core.run()
    core.check_outputs()
    assert core.scheduler.num_preemptions <= 2
    assert core.num_steps <= 2 * 78 + 10


def test_batch_makes_room_for_growing_interactive_requests() -> None:
    """However little its tenant has been served."""
    core = FakeCore(num_pages=13, max_step_tokens=64, batch_floor_share=0.0)
    core.add(add_request(0, prompt_of(rng, 16), max_tokens=30, tenant="greedy"))
    core.step()
    core.add(add_request(1, prompt_of(rng, 12), max_tokens=30, tenant="modest", priority=Priority.BATCH))
    while not core.scheduler.num_preemptions:
        core.step()
    assert core.scheduler.requests[1].status is Status.PREEMPTED
    core.run()
    core.check_outputs()


def test_a_preempted_request_resumes_before_later_ones_of_its_tenant() -> None:
    core = FakeCore(num_pages=17, max_step_tokens=64)
    for handle in range(2):
        core.add(add_request(handle, prompt_of(rng, 24), max_tokens=36))
    core.step()
    core.add(add_request(2, prompt_of(rng, 24), max_tokens=36))
    while core.scheduler.requests:
        core.step()
        if core.replies[1].reason is None and core.scheduler.requests[1].status is Status.PREEMPTED:
            assert not core.replies[2].started
    assert core.scheduler.num_preemptions >= 1
    core.check_outputs()


def test_nobody_is_admitted_into_the_page_that_a_running_request_needs_next() -> None:
    core = FakeCore(num_pages=11, max_step_tokens=64)
    core.add(add_request(0, prompt_of(rng, 18), max_tokens=6))
    core.step()
    core.add(add_request(1, prompt_of(rng, 20), max_tokens=5))  # as many pages as are available now
    core.run()
    core.check_outputs()
    assert core.scheduler.num_preemptions == 0


def test_nobody_is_admitted_in_the_step_of_a_famine() -> None:
    core = FakeCore(num_pages=17, max_step_tokens=64)
    for handle in range(2):
        core.add(add_request(handle, prompt_of(rng, 24), max_tokens=36))
    while core.pool.num_available:
        core.step()
    core.add(add_request(2, prompt_of(rng, 3), max_tokens=1, tenant="small"))
    while not core.scheduler.num_preemptions:
        core.step()
    assert 2 not in planned(core)
    core.step()
    assert 2 in planned(core)
    core.run()
    core.check_outputs()


def test_many_that_do_not_fit_together_all_finish() -> None:
    core = FakeCore(num_pages=21, max_step_tokens=32, max_num_running=16)
    for handle in range(30):
        core.add(add_request(handle, prompt_of(rng, 8), max_tokens=70, tenant=f"t{handle % 5}"))
    core.run(30 * 80)
    core.check_outputs()
    assert core.scheduler.num_preemptions < 30 * 10


def test_one_request_may_fill_the_whole_pool() -> None:
    core = FakeCore(num_pages=6, tokens_per_page=[4], max_step_tokens=3)
    assert core.scheduler.capacity_tokens(0) == 20
    assert core.scheduler.fits(20, 0)
    assert not core.scheduler.fits(21, 0)
    core.add(add_request(0, prompt_of(rng, 13), max_tokens=7))
    core.run()
    core.check_outputs()
    with pytest.raises(AssertionError, match="can never run"):
        core.add(add_request(1, prompt_of(rng, 13), max_tokens=8))


def test_more_decodes_than_a_step_has_tokens() -> None:
    core = FakeCore(max_num_running=8, max_step_tokens=3)
    for handle in range(8):
        core.add(add_request(handle, prompt_of(rng, 2), max_tokens=12, tenant=f"t{handle % 2}"))
    core.run(400)
    core.check_outputs()


def test_an_abort_frees_pages_at_once() -> None:
    core = FakeCore(max_step_tokens=8)
    for handle in range(3):
        core.add(add_request(handle, prompt_of(rng, 12), max_tokens=20))
    core.step()
    core.step()  # 0 decodes, 1 is half done, 2 waits
    assert [core.scheduler.requests[handle].status for handle in range(3)] == [1, 1, 0]
    for handle in range(3):
        core.abort(handle)
    assert core.pool.num_used == 0
    assert not core.scheduler.requests
    core.add(add_request(3, prompt_of(rng, 12)))
    core.run()
    core.check_outputs()


def test_a_prefix_is_found_under_the_same_salt_only() -> None:
    core = FakeCore(num_pages=100, max_step_tokens=64)
    prompt = prompt_of(rng, 20)
    core.add(add_request(0, prompt, salt=b"one"))
    core.run()
    core.add(add_request(1, prompt, salt=b"one", tenant="another"))
    core.add(add_request(2, prompt, salt=b"two"))
    core.add(add_request(3, [*prompt[:10], 0, 0, 0, 0], salt=b"one"))
    core.run()
    assert [core.replies[handle].cached_tokens for handle in range(4)] == [0, 16, 0, 8]
    core.check_outputs()


def test_a_prefix_is_not_shared_between_models_even_of_one_revision() -> None:
    core = FakeCore(num_pages=100, tokens_per_page=[4, 4, 8], revisions=["r", "r", "r"], max_step_tokens=64)
    prompt = prompt_of(rng, 20)
    for model in range(3):
        core.add(add_request(model, prompt, model=model))
        core.run()
    assert [core.replies[handle].cached_tokens for handle in range(3)] == [0, 0, 0]
    core.check_outputs()


def test_the_root_of_a_prefix_has_no_two_readings() -> None:
    """A revision that ends like a salt begins is still another revision."""
    prompt = prompt_of(rng, 20)
    core = FakeCore(num_pages=100, tokens_per_page=[4], revisions=["ab"], max_step_tokens=64)
    other = FakeCore(num_pages=100, tokens_per_page=[4], revisions=["a"], max_step_tokens=64)
    first = core.add(add_request(0, prompt, salt=b"c"))
    second = other.add(add_request(0, prompt, salt=b"bc"))
    core.run()
    other.run()
    assert first.page_hashes
    assert set(first.page_hashes).isdisjoint(second.page_hashes)


def test_output_is_found_again_as_a_prefix() -> None:
    core = FakeCore(num_pages=100, max_step_tokens=64)
    prompt = prompt_of(rng, 10)
    first = core.add(add_request(0, prompt, max_tokens=11))
    core.run()
    turn = [*prompt, *core.replies[0].ids, 1, 2, 3]
    core.add(add_request(1, turn, max_tokens=2))
    core.run()
    # 21 tokens, of which the last was never computed: 5 full pages.
    assert first.num_computed_tokens == 0, "reset when its pages were released"
    assert core.replies[1].cached_tokens == 20
    core.check_outputs()


def test_requests_that_run_share_pages_of_a_prefix() -> None:
    core = FakeCore(num_pages=100, max_step_tokens=64)
    prompt = prompt_of(rng, 17)
    core.add(add_request(0, prompt, max_tokens=30))
    core.step()
    core.add(add_request(1, prompt, max_tokens=30))
    core.step()
    assert core.pool.num_used == 5 + 1
    core.abort(0)
    core.run()
    core.check_outputs()


def test_two_that_compute_a_prefix_at_once_keep_their_own() -> None:
    core = FakeCore(num_pages=100, max_step_tokens=64)
    beginning = prompt_of(rng, 8)  # too little to wait for
    prompts = [beginning + prompt_of(rng, 9) for _ in range(2)]
    for handle in range(2):
        core.add(add_request(handle, prompts[handle], max_tokens=4))
    core.step()
    assert core.pool.num_used == 10
    core.run()
    core.check_outputs()
    assert core.pool.num_cached == 2 + 3 + 3


def test_the_last_prompt_token_is_always_computed() -> None:
    core = FakeCore(num_pages=100, max_step_tokens=64)
    prompt = prompt_of(rng, 16)
    for handle in range(2):
        core.add(add_request(handle, prompt, max_tokens=2))
        core.run()
    assert core.replies[1].cached_tokens == 12
    core.check_outputs()


def test_cached_tokens_count_the_prompt_only() -> None:
    """A request that goes on after a crash finds its own pages; what is behind the prompt is not its prompt's."""
    core = FakeCore(num_pages=100, max_step_tokens=64)
    message = add_request(0, prompt_of(rng, 9), max_tokens=12)
    core.add(message)
    core.run()
    output = undisturbed(message)[0]
    core.add(add_request(1, list(memoryview(message.prompt_ids).cast("I")), output=output[:10], max_tokens=12))
    core.run()
    assert core.replies[1].cached_tokens == 9
    core.check_outputs()


def test_probation_runs_alone_until_it_has_produced_a_token() -> None:
    core = FakeCore(max_step_tokens=8)
    core.add(add_request(0, prompt_of(rng, 4), max_tokens=30))
    core.step()
    core.add(add_request(1, prompt_of(rng, 20), max_tokens=10, probation=True))
    core.add(add_request(2, prompt_of(rng, 6), max_tokens=10, probation=True, priority=Priority.BATCH))
    core.add(add_request(3, prompt_of(rng, 4), max_tokens=10))
    steps = []
    for _ in range(10):
        core.step()
        steps.append(list(planned(core)))
    assert steps[:6:2] == [[1], [1], [1]], "every other step, so that neither waits for the other"
    assert [2] in steps
    assert all(0 in step for step in steps[1::2])
    assert not core.scheduler.requests[1].probation
    assert any({0, 1, 2, 3} == set(step) for step in steps), "then like any other"
    core.run()
    core.check_outputs()


def test_probation_waits_for_a_place_before_anyone_new() -> None:
    core = FakeCore(max_num_running=1)
    core.add(add_request(0, prompt_of(rng, 4), max_tokens=5))
    core.step()
    core.add(add_request(1, prompt_of(rng, 4), max_tokens=5))
    core.add(add_request(2, prompt_of(rng, 4), max_tokens=5, probation=True))
    started = []
    while core.scheduler.requests:
        started += [s.handle for s in core.step().started]
    assert started == [2, 1]
    core.check_outputs()


def test_a_large_request_on_probation_is_not_starved_by_small_ones() -> None:
    core = FakeCore(num_pages=21, max_num_running=6, max_step_tokens=16)
    for handle in range(1, 7):
        core.add(add_request(handle, prompt_of(rng, 8), max_tokens=8, tenant=f"t{handle}"))
    core.step()
    core.add(add_request(0, prompt_of(rng, 70), max_tokens=5, probation=True))
    handle = 10
    while core.replies[0].reason is None:
        while core.scheduler.num_waiting < 6:
            core.add(add_request(handle, prompt_of(rng, 8), max_tokens=8, tenant=f"t{handle % 7}"))
            handle += 1
        core.step()
        assert core.num_steps < 100
    assert core.replies[0].output == undisturbed(core.replies[0].message)[0]


def test_probation_can_be_aborted_and_preempted() -> None:
    core = FakeCore(num_pages=12, max_step_tokens=4, max_num_running=4)
    core.add(add_request(0, prompt_of(rng, 4), max_tokens=40))
    core.step()
    core.add(add_request(1, prompt_of(rng, 20), max_tokens=4, probation=True, tenant="late"))
    core.add(add_request(2, prompt_of(rng, 8), max_tokens=4, probation=True, tenant="late"))
    core.step()
    core.abort(2)
    core.run()
    core.check_outputs()


def test_a_resumed_request_is_charged_as_input_and_a_recompute_not_at_all() -> None:
    core = FakeCore(num_pages=100, max_step_tokens=5)
    message = add_request(0, prompt_of(rng, 9), max_tokens=12)
    output = undisturbed(message)[0]
    request = core.add(add_request(0, list(memoryview(message.prompt_ids).cast("I")), output=output[:6], max_tokens=12))
    counter = core.scheduler.ranking.queues[Priority.INTERACTIVE].counter
    charged = []
    for _ in range(3):
        core.step()
        charged.append(counter.counter("tenant"))
    core.scheduler.admission.preempt(request)
    core.pool.release(core.pool.take(core.pool.num_available))  # nothing is found again
    for _ in range(4):
        core.step()
        charged.append(counter.counter("tenant"))
    assert charged == [5, 10, 15 + OUTPUT_COST, 17, 17, 17, 17 + OUTPUT_COST]
    core.run()
    core.check_outputs()


def test_a_long_prompt_does_not_hold_up_another_tenants_short_one() -> None:
    core = FakeCore(num_pages=100, max_step_tokens=16)
    core.add(add_request(0, prompt_of(rng, 160), max_tokens=2, tenant="long"))
    core.step()
    core.add(add_request(1, prompt_of(rng, 12), max_tokens=2, tenant="short"))
    core.step()  # both count as served alike, and the long one is older
    report = core.step()
    assert [t.handle for t in report.tokens] == [1]
    core.run()
    core.check_outputs()


def test_a_long_prompt_does_not_hold_up_its_own_tenants_short_ones() -> None:
    """They take turns with it: half of the time is the long one's, whatever comes."""
    core = FakeCore(num_pages=200, max_step_tokens=16)
    core.add(add_request(0, prompt_of(rng, 400), max_tokens=2))
    core.step()
    for handle in range(1, 4):
        core.add(add_request(handle, prompt_of(rng, 12), max_tokens=2))
    core.step()
    assert planned(core) == {1: 12, 0: 4}
    first: dict[int, int] = {}
    while core.pipeline.busy:
        for tokens in core.step().tokens:
            first.setdefault(tokens.handle, core.num_steps)
    assert first[1] <= first[2] <= first[3] < 10
    assert first[0] < 32, "28 steps without the others"
    core.check_outputs()


def test_prompts_of_like_length_stay_in_order_of_arrival() -> None:
    core = FakeCore(num_pages=200, max_step_tokens=16)
    for handle, length in enumerate([60, 40, 20, 50]):
        core.add(add_request(handle, prompt_of(rng, length), max_tokens=1))
    order: list[int] = []
    while core.pipeline.busy:
        order += [finished.handle for finished in core.step().finished]
    assert order == [0, 1, 2, 3]


def test_nobody_takes_the_pages_that_a_tenants_oldest_waits_for() -> None:
    """A long one that has yet to be admitted goes before all short ones of its tenant that came later."""
    core = FakeCore(num_pages=40, max_step_tokens=64)
    core.add(add_request(0, prompt_of(rng, 100), max_tokens=30))
    core.step()
    core.step()  # it decodes now
    core.add(add_request(1, prompt_of(rng, 110), max_tokens=2))
    for handle in range(2, 8):
        core.add(add_request(handle, prompt_of(rng, 4), max_tokens=2))
    while core.replies[0].reason is None:
        core.step()
        waiting = [core.scheduler.requests[handle] for handle in range(1, 8)]
        assert core.replies[0].reason or all(request.status is Status.WAITING for request in waiting)
    core.run()
    core.check_outputs()


def test_stop_ids_end_a_request() -> None:
    core = FakeCore(num_pages=200, max_num_running=64, max_step_tokens=256)
    for handle in range(40):
        core.add(add_request(handle, prompt_of(rng, 3), max_tokens=20, stop_ids=[STOP_ID, 3]))
    core.run()
    core.check_outputs()
    reasons = [reply.reason for reply in core.replies.values()]
    assert FinishReason.END_TURN in reasons
    assert FinishReason.MAX_TOKENS in reasons


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_same_beginning_is_computed_once_also_when_all_come_at_once(overlaps: bool) -> None:
    core = FakeCore(num_pages=200, max_num_running=64, max_step_tokens=256, overlaps=overlaps)
    beginning = prompt_of(rng, 41)
    for handle in range(20):
        core.add(add_request(handle, [*beginning, handle], max_tokens=3))
    core.step()
    assert planned(core) == {0: 42}
    while len(planned(core)) < 19:
        core.step()
    assert planned(core) == {0: 1} | dict.fromkeys(range(1, 20), 2) or set(planned(core).values()) == {2}
    core.run()
    core.check_outputs()
    assert [core.replies[handle].cached_tokens for handle in range(20)] == [0] + [40] * 19


def test_nobody_waits_for_little() -> None:
    core = FakeCore(num_pages=200, max_num_running=64, max_step_tokens=256)
    beginning = prompt_of(rng, 8)
    for handle in range(4):
        core.add(add_request(handle, beginning + prompt_of(rng, 10), max_tokens=3))
    core.step()
    assert len(planned(core)) == 4, "eight of eighteen tokens are not worth a step"
    core.run()
    core.check_outputs()


def test_who_waits_for_pages_of_a_request_that_leaves_computes_them() -> None:
    core = FakeCore(num_pages=200, max_step_tokens=64, overlaps=True)
    beginning = prompt_of(rng, 40)
    for handle in range(2):
        core.add(add_request(handle, [*beginning, handle], max_tokens=3))
    core.step()
    core.abort(0)
    core.run()
    assert core.replies[1].cached_tokens == 0
    core.check_outputs()
