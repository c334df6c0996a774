"""The virtual token counter and the floor share, by themselves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.engine.core.fairness import FloorShare, VirtualTokenCounter


def test_the_least_served_is_next() -> None:
    counter = VirtualTokenCounter()
    for tenant in "abc":
        counter.start_waiting(tenant)
    assert counter.least() == "a", "among equals the one that waits longest"
    counter.charge("a", 3.0, 1.0)
    counter.charge("b", 2.0, 1.0)
    assert counter.least() == "c"
    counter.charge("c", 4.0, 1.0)
    assert counter.least() == "b"
    counter.stop_waiting("b")
    assert counter.least() == "a"
    counter.stop_waiting("a")
    counter.stop_waiting("c")
    assert counter.least() is None


def test_weights_divide_the_cost() -> None:
    counter = VirtualTokenCounter()
    counter.start_waiting("heavy")
    counter.start_waiting("light")
    counter.charge("heavy", 30.0, 4.0)
    counter.charge("light", 10.0, 1.0)
    assert counter.least() == "heavy"
    assert counter.counter("heavy") == 7.5


def test_nobody_saves_up_service_by_being_away() -> None:
    counter = VirtualTokenCounter()
    counter.start_waiting("busy")
    counter.charge("busy", 1000.0, 1.0)
    counter.start_waiting("new")
    assert counter.counter("new") == 1000.0
    counter.charge("new", 50.0, 1.0)
    counter.stop_waiting("busy")
    counter.stop_waiting("new")
    counter.start_waiting("later")
    assert counter.counter("later") == 1050.0, "nobody waits: lifted to the one that stopped last"


def test_a_tenant_above_the_others_is_not_lowered() -> None:
    counter = VirtualTokenCounter()
    counter.start_waiting("greedy")
    counter.charge("greedy", 500.0, 1.0)
    counter.stop_waiting("greedy")
    counter.start_waiting("a")
    assert counter.counter("a") == 500.0
    counter.charge("greedy", 100.0, 1.0)  # still decoding
    counter.start_waiting("greedy")
    assert counter.counter("greedy") == 600.0
    assert counter.least() == "a"


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_equals_a_plain_model(seed: int) -> None:
    """Tenants come and go: the lazily kept heap gives what a search of all would."""
    rng = random.Random(seed)
    counter = VirtualTokenCounter()
    counters: dict[str, float] = {}
    waiting: dict[str, int] = {}
    last = ""
    for number in range(300):
        tenant = f"t{rng.randrange(40)}"
        if rng.random() < 0.5 and tenant not in waiting:
            floor = min((counters[t] for t in waiting), default=counters.get(last, 0.0))
            counters[tenant] = max(counters.get(tenant, 0.0), floor)
            waiting[tenant] = number
            counter.start_waiting(tenant)
        elif rng.random() < 0.5 and tenant in waiting:
            del waiting[tenant]
            last = tenant
            counter.stop_waiting(tenant)
        if tenant in counters:
            cost = float(rng.randrange(9))
            counters[tenant] += cost
            counter.charge(tenant, cost, 1.0)
        expected = min(waiting, key=lambda t: (counters[t], waiting[t]), default=None)
        assert counter.least() == expected
        assert all(counter.counter(t) == c for t, c in counters.items())


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_sweeping_loses_nobody_that_waits(seed: int) -> None:
    rng = random.Random(seed)
    counter = VirtualTokenCounter()
    waiting: dict[str, int] = {}
    for number in range(400):
        counter._sweep_at = 1  # at every start
        tenant = f"t{rng.randrange(30)}"
        if tenant in waiting:
            del waiting[tenant]
            counter.stop_waiting(tenant)
        else:
            floor = min((counter.counter(t) for t in waiting), default=0.0)
            counter.start_waiting(tenant)
            waiting[tenant] = number
            assert counter.counter(tenant) >= floor
        counter.charge(f"t{rng.randrange(30)}", float(rng.randrange(9)), 1.0)
        assert counter.least() == min(waiting, key=lambda t: (counter.counter(t), waiting[t]), default=None)


def test_tenants_that_left_are_forgotten() -> None:
    counter = VirtualTokenCounter()
    counter.start_waiting("resident")
    for number in range(20_000):
        tenant = f"visitor {number}"
        counter.start_waiting(tenant)
        counter.charge(tenant, 1.0, 1.0)
        counter.stop_waiting(tenant)
        counter.charge("resident", 2.0, 1.0)
    assert len(counter._counters) < 5000
    assert len(counter._heap) < 5000
    assert counter.least() == "resident"


def test_many_starts_of_one_tenant_leave_no_litter() -> None:
    counter = VirtualTokenCounter()
    counter.start_waiting("blocked")  # least, so nothing above it in the heap is ever looked at
    counter.charge("visitor", 5.0, 1.0)
    for _ in range(20_000):
        counter.start_waiting("visitor")
        counter.stop_waiting("visitor")
    assert len(counter._heap) < 5000


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_the_lower_class_keeps_its_share(share: float) -> None:
    floor = FloorShare(share=share, quantum=100.0)
    served = {True: 0.0, False: 0.0}
    for _ in range(20_000):
        due = floor.due
        served[due] += 10.0
        floor.charge(higher=0.0 if due else 10.0, lower=10.0 if due else 0.0)
    assert served[True] / sum(served.values()) == pytest.approx(share, rel=0.1)


def test_a_turn_lasts_until_it_is_used_up() -> None:
    floor = FloorShare(share=0.5, quantum=100.0)
    floor.charge(higher=180.0, lower=0.0)
    assert not floor.due
    floor.charge(higher=40.0, lower=0.0)
    assert floor.due
    floor.charge(higher=0.0, lower=100.0)
    assert floor.due, "credit is left"
    floor.charge(higher=0.0, lower=200.0)
    assert not floor.due
    floor.charge(higher=160.0, lower=0.0)
    assert not floor.due, "the next turn is earned anew"


def test_credit_is_bounded_and_cleared() -> None:
    floor = FloorShare(share=0.5, quantum=10.0)
    floor.charge(higher=1e9, lower=0.0)
    assert floor.overdue
    floor.charge(higher=0.0, lower=400.0)
    assert not floor.due, "what was earned beyond the bound is lost"
    floor.charge(higher=1e9, lower=0.0)
    floor.clear()
    assert not floor.due
    assert not floor.overdue


def test_no_share_is_never_due() -> None:
    floor = FloorShare(share=0.0, quantum=1.0)
    floor.charge(higher=1e9, lower=0.0)
    assert not floor.due
