"""How many requests of batches wait at an engine: enough to keep it full, never more than the bound."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.shim.batches.pace import FIRST_WINDOW, MAX_WINDOW, Pace


def test_an_engine_that_takes_everything_is_sent_more() -> None:
    pace = Pace()
    sent = []
    for look in range(8):
        pace.look(0, look * 0.02)
        sent.append(pace.room(0, 0, look * 0.02))
        pace.sent(sent[-1])
    assert sent == [FIRST_WINDOW, 8, 16, 32, 64, 64, 64, 64]


def test_a_full_engine_is_left_a_few() -> None:
    pace = Pace()
    pace.window = 64
    for second in range(40):
        pace.look(pace.window, float(second))
        assert pace.room(pace.window, 64, float(second)) == 0
    assert pace.window == 1


def test_nothing_grows_without_work() -> None:
    pace = Pace()
    for look in range(100):
        pace.look(0, float(look))
    assert pace.window == FIRST_WINDOW


def test_refusals_close_longer_and_longer_until_one_starts() -> None:
    pace = Pace()
    now, pauses = 0.0, []
    for _ in range(6):
        pace.refused(now, None)
        pace.refused(now + 0.01, None)  # others of the same moment
        assert pace.room(0, 0, now) == 0
        pauses.append(pace.open_at - now)
        now = pace.open_at
        assert pace.room(0, 0, now) >= 1
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0]
    pace.started()
    pace.refused(now, None)
    assert pace.open_at == now + 0.25


@settings(deadline=None)
@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), st.floats(0, 3)), max_size=60))
def test_the_window_stays_within_its_bounds(bound: int, moves: list[tuple[int, int, float]]) -> None:
    """Whatever the engine does: at least one is tried when it is open, never more than the bound wait."""
    pace = Pace(bound)
    now = 0.0
    for waiting, move, seconds in moves:
        now += seconds
        match move:
            case 0:
                pace.look(waiting, now)
            case 1:
                pace.sent(waiting)
            case 2:
                pace.refused(now, seconds or None)
            case _:
                pace.started()
        assert 1 <= pace.window <= max(1, min(bound, MAX_WINDOW))
        assert 0 <= pace.room(waiting, waiting, now) <= pace.window
        assert pace.room(0, 0, pace.open_at) >= 1
        assert pace.open_at <= now + 5.0


def settle(pace: Pace, step_s: Callable[[int], float], seconds: int, *, interactive: bool, start: float = 0.0) -> int:
    """Runs for a while at an engine whose step takes that long with so many requests; how many are in flight then."""
    in_flight = 0
    for look in range(2 * seconds):
        now = start + look / 2
        in_flight = int(min(64, pace.limit))  # what ends is made up for, as far as may be
        for _ in range(100):
            pace.step(step_s(in_flight))
        pace.heed(in_flight, interactive=interactive, now=now)
    return in_flight


def test_a_slow_step_makes_way_for_interactive_requests() -> None:
    """As on a processor, where each request lengthens the step: down beside interactive ones, up again without."""

    def step_s(count: int) -> float:
        return 0.004 + 0.0005 * count

    pace = Pace()
    for _ in range(100):
        pace.step(step_s(2))
    assert settle(pace, step_s, 20, interactive=False) == 64
    assert 6 <= settle(pace, step_s, 60, interactive=True, start=20.0) <= 16
    assert settle(pace, step_s, 10, interactive=False, start=80.0) == 64


def test_where_many_cost_as_much_as_one_nothing_is_held_back() -> None:
    """As on a GPU."""
    pace = Pace()
    assert settle(pace, lambda count: 0.012 + 0.0001 * count, 60, interactive=True) == 64


def test_some_work_goes_on_however_slow_a_step_is() -> None:
    pace = Pace()
    for _ in range(20):
        pace.step(0.001)
    assert settle(pace, lambda count: 1.0, 60, interactive=True) == 4
