"""Drafts: what a text foretells of itself, how long a draft pays, and that a step is none the wiser for wrong ones."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fake_core import FakeCore, add_request, prompt_of, undisturbed

from aiexport_edge.engine.core import drafts
from aiexport_edge.engine.core.drafts import MOST_GUESSES, Drafter, StepLoad, foretold, num_worth, row_cost
from aiexport_edge.engine.core.protocol import FinishReason
from aiexport_edge.engine.core.request import Request, make_request


def looked(ids: list[int]) -> Drafter:
    drafter = Drafter(ids)
    drafter.look(len(ids))
    return drafter


def request_of(ids: list[int]) -> Request:
    request = make_request(add_request(0, ids), arrival=0)
    request.drafter = Drafter(request.token_ids)
    return request


def test_what_followed_the_last_three_ids_is_foretold() -> None:
    assert looked([1, 2, 3, 4, 5, 6, 9, 1, 2, 3]).guesses(3) == (4, 5, 6)
    assert looked([1, 2, 3, 4, 5, 6, 9, 2, 3]).guesses(3) == ()
    assert looked([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).guesses(1) == (5,), "the last time counts"


def test_what_repeats_itself_goes_on() -> None:
    assert looked([7, 1, 2, 1, 2, 1, 2, 1]).guesses(5) == (2, 1, 2, 1, 2)
    assert looked([4] * 4).guesses(3) == (4, 4, 4)


@pytest.mark.parametrize("ids", [[], [1], [1, 2], [1, 2, 3], [5, 5, 5]])
def test_short_texts_foretell_nothing(ids: list[int]) -> None:
    drafter = looked(ids)
    assert drafter.guesses(4) == ()
    assert not drafter.is_worth_sitting_out


def last_time(ids: list[int]) -> int | None:
    """By definition: what came after the last time that the last three ids came."""
    for end in range(len(ids) - 1, 2, -1):
        if ids[end - 3 : end] == ids[-3:]:
            return ids[end]
    return None


@pytest.mark.parametrize("sorted_index", [False, True])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=60), first=st.integers(0, 60))
def test_whatever_it_sees_when_it_says_what_it_should(
    sorted_index: bool, monkeypatch: pytest.MonkeyPatch, ids: list[int], first: int
) -> None:
    """A guess that came true is followed further, so the text that it began in need not be the last such."""
    if sorted_index:
        monkeypatch.setattr(drafts, "_SHORT", 0)
    drafter, seen = Drafter(ids), min(first, len(ids))
    drafter.look(seen)
    assert drafter.guesses(1) == (() if last_time(ids[:seen]) is None else (last_time(ids[:seen]),))
    before = drafter.guesses(1)
    while seen < len(ids):
        expected = last_time(ids[: seen + 1])
        was_hit = before == (ids[seen],)
        seen += 1
        drafter.look(seen)
        before = drafter.guesses(1)
        if was_hit:
            assert before, "it goes on"
        else:
            assert before == (() if expected is None else (expected,))
        assert 0 < drafter.chance < 1


def test_hits_make_drafts_longer_and_misses_end_them() -> None:
    def length(ids: list[int]) -> int:
        request, load = request_of(ids), StepLoad(12.0)
        assert request.drafter is not None
        request.drafter.look(10)
        load.add(1, 1)
        chance, guesses = foretold(request)
        return num_worth(chance, len(guesses), load, 1.0)

    copies = [*range(10, 40)] * 3
    assert length(copies[:33]) < length(copies[:45]) <= MOST_GUESSES
    assert length(copies) == MOST_GUESSES
    rng = random.Random(4)
    beginnings = [[1, 2, 3, rng.randrange(100, 2000)] for _ in range(30)]
    assert length([*itertools.chain(*beginnings), 1, 2, 3]) == 0


def test_a_row_pays_where_reading_the_weights_is_what_costs() -> None:
    alone, many = StepLoad(12.0), StepLoad(12.0)
    alone.add(1, 1)
    many.add(200, 200)
    assert alone.pays(0.3, 1.0)
    assert not alone.pays(0.05, 1.0)
    assert not many.pays(0.9, 1.0)
    assert not alone.pays(0.3, row_cost(100_000, 2000.0)), "keys and values are read for every row"
    assert row_cost(5000, math.inf) == 1.0


def test_guesses_that_all_come_true_save_their_steps() -> None:
    core = FakeCore(guess_rate=1.0, max_step_tokens=64)
    core.add(add_request(1, prompt_of(random.Random(1), 5), max_tokens=1 + 9 * 4))
    core.run()
    core.check_outputs()
    assert core.num_steps == 1 + 4
    assert core.scheduler.num_guessed_tokens == core.scheduler.num_accepted_tokens == [32]


def test_wrong_guesses_cost_no_step() -> None:
    core = FakeCore(guess_rate=0.0, max_step_tokens=64)
    core.add(add_request(1, prompt_of(random.Random(1), 5), max_tokens=10))
    core.run()
    core.check_outputs()
    assert core.num_steps == 10


def test_guesses_take_no_page_that_somebody_waits_for() -> None:
    """Two requests fill the pool but for one page: there is none for guesses, and nobody is preempted."""
    core = FakeCore(num_pages=11, max_step_tokens=64, guess_rate=1.0)
    rng = random.Random(2)
    for handle in range(2):
        core.add(add_request(handle, prompt_of(rng, 15), max_tokens=4))
    core.run()
    core.check_outputs()
    assert core.scheduler.num_preemptions == 0


def test_an_abort_while_guesses_are_in_flight() -> None:
    core = FakeCore(overlaps=True, guess_rate=1.0, max_step_tokens=64)
    core.add(add_request(1, prompt_of(random.Random(1), 5), max_tokens=40))
    while not any(chunk.draft for model in core.plan.models for chunk in model.chunks):
        core.step()
    core.abort(1)
    core.run()
    assert core.replies[1].reason is FinishReason.ABORTED
    core.check_outputs()


def test_beside_steps_in_flight_a_draft_is_made_of_known_ids_only() -> None:
    core = FakeCore(overlaps=True, guess_rate=1.0, max_step_tokens=64)
    message = add_request(1, prompt_of(random.Random(1), 5), max_tokens=60)
    core.add(message)
    core.run()  # the runner looks at every chunk
    assert core.replies[1].ids == undisturbed(message)[0]
    assert core.scheduler.num_accepted_tokens[0] > 20
