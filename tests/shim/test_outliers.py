"""When an engine is given up for a while, and how it comes back."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from aiexport_edge.shim.engines.outliers import (
    FIRST_EJECTION_S,
    FORGIVEN_S,
    LAST_EJECTION_S,
    LOSSES_S,
    MAX_FAILURES,
    Fitness,
    Outlier,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fail(outlier: Outlier, number: int = MAX_FAILURES) -> None:
    for _ in range(number):
        outlier.failed(on_trial=outlier.sent())


def test_failures_in_a_row_eject(clock: Clock) -> None:
    outlier = Outlier(clock)
    fail(outlier, MAX_FAILURES - 1)
    outlier.answered(on_trial=outlier.sent())
    fail(outlier, MAX_FAILURES - 1)
    assert outlier.admits
    fail(outlier, 1)
    assert outlier.fitness is Fitness.EJECTED
    assert not outlier.admits
    assert outlier.ejected_for == FIRST_EJECTION_S


def test_one_trial_at_a_time_then_healthy(clock: Clock) -> None:
    outlier = Outlier(clock)
    fail(outlier)
    clock.now += FIRST_EJECTION_S
    assert outlier.fitness is Fitness.TRIAL
    assert outlier.admits
    on_trial = outlier.sent()
    assert on_trial
    assert not outlier.admits
    outlier.withdrawn(on_trial=on_trial)  # the client has left
    assert outlier.admits
    outlier.answered(on_trial=outlier.sent())
    assert outlier.fitness is Fitness.HEALTHY


def test_each_trial_that_fails_doubles_the_time(clock: Clock) -> None:
    outlier = Outlier(clock)
    fail(outlier)
    expected = FIRST_EJECTION_S
    for _ in range(10):
        assert outlier.ejected_for == min(expected, LAST_EJECTION_S)
        clock.now += outlier.ejected_for
        fail(outlier, 1)
        expected *= 2
    assert outlier.ejected_for == LAST_EJECTION_S
    assert outlier.num_ejections == 11


def test_health_is_forgiven_step_by_step(clock: Clock) -> None:
    outlier = Outlier(clock)
    fail(outlier)
    clock.now += outlier.ejected_for
    fail(outlier, 1)
    clock.now += outlier.ejected_for
    outlier.answered(on_trial=outlier.sent())
    clock.now += FORGIVEN_S
    fail(outlier)
    assert outlier.ejected_for == 2 * FIRST_EJECTION_S  # not four times


def test_connections_lost_in_a_short_time_eject(clock: Clock) -> None:
    outlier = Outlier(clock)
    for _ in range(5):  # now and then is no reason
        outlier.lost()
        outlier.answered(on_trial=outlier.sent())
        clock.now += LOSSES_S / 2 + 1
    assert outlier.admits
    outlier.lost()
    outlier.answered(on_trial=outlier.sent())
    outlier.lost()
    assert outlier.fitness is Fitness.EJECTED


def test_a_full_engine_is_not_ejected(clock: Clock) -> None:
    outlier = Outlier(clock)
    for _ in range(20):
        outlier.answered(on_trial=outlier.sent())
        outlier.full(0.2)
    assert outlier.is_full
    assert outlier.admits
    clock.now += 1
    assert not outlier.is_full


def test_an_answer_in_spite_of_the_ejection_heals(clock: Clock) -> None:
    """It was the last one there was."""
    outlier = Outlier(clock)
    fail(outlier)
    fail(outlier, 2)
    assert outlier.ejected_for == FIRST_EJECTION_S  # asked for want of another: not punished further
    outlier.answered(on_trial=outlier.sent())
    assert outlier.fitness is Fitness.HEALTHY


class Any(RuleBasedStateMachine):
    """Any history: trials are counted right, and time alone always brings an engine back to a trial."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.outlier = Outlier(self.clock)
        self.open: list[bool] = []

    @rule()
    def send(self) -> None:
        self.open.append(self.outlier.sent())

    @rule(how=st.sampled_from(["answered", "failed", "withdrawn"]))
    def end(self, how: str) -> None:
        if self.open:
            getattr(self.outlier, how)(on_trial=self.open.pop())

    @rule()
    def lose(self) -> None:
        self.outlier.lost()

    @rule(seconds=st.floats(0, 400))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def trials_are_counted(self) -> None:
        assert self.outlier._trials == sum(self.open)
        assert 0 <= self.outlier.ejected_for <= LAST_EJECTION_S
        if not any(self.open) and self.outlier.fitness is not Fitness.EJECTED:
            assert self.outlier.admits


TestAny = Any.TestCase
TestAny.settings = settings(max_examples=60, stateful_step_count=40)
