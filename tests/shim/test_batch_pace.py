"""How many requests of batches wait at an engine: enough to keep it full, never more than the bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiexport_edge.shim.batches.pace import FIRST_WINDOW, MAX_WINDOW, Pace


def test_an_engine_that_takes_everything_is_sent_more() -> None:
    pace = Pace()
    sent = []
    for look in range(8):
        pace.look(0, look * 0.02)
        sent.append(pace.room(0, look * 0.02))
        pace.sent(sent[-1])
    assert sent == [FIRST_WINDOW, 8, 16, 32, 64, 64, 64, 64]


def test_a_full_engine_is_left_a_few() -> None:
    pace = Pace()
    pace.window = 64
    for second in range(40):
        pace.look(pace.window, float(second))
        assert pace.room(pace.window, float(second)) == 0
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
        assert pace.room(0, now) == 0
        pauses.append(pace.open_at - now)
        now = pace.open_at
        assert pace.room(0, now) >= 1
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0]
    pace.started()
    pace.refused(now, None)
    assert pace.open_at == now + 0.25


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
        assert 0 <= pace.room(waiting, now) <= pace.window
        assert pace.room(0, pace.open_at) >= 1
        assert pace.open_at <= now + 5.0
