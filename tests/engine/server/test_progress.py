"""What is written while models load: nothing at first, a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import logging

import pytest

from aiexport_edge.engine.server.progress import BAR_S, LINE_S, QUIET_S, StartProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_short_start_writes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for stream in (io.StringIO(), Terminal()):
        clock = Clock()
        progress = StartProgress(["m"], stream=stream, clock=clock)
        clock.now = QUIET_S - 0.1
        progress.weights(0, 5, 10)
        progress.over()
        assert stream.getvalue() == ""
    assert caplog.messages == []


def test_a_terminal_gets_one_bar_which_goes_away() -> None:
    stream, clock = Terminal(), Clock()
    progress = StartProgress(["m"], stream=stream, clock=clock)
    clock.now = QUIET_S
    progress.weights(0, 1 << 30, 4 << 30)
    clock.now += BAR_S / 2
    progress.weights(0, 2 << 30, 4 << 30)  # too soon
    clock.now += BAR_S
    progress.warming(3, 4)
    progress.over()
    progress.over()
    assert stream.getvalue().split("\r\x1b[K") == [
        "",
        "model m: weights [########......................]  25% 1.0 of 4.0 GiB",
        "warming up [######################........]  75% 3 of 4",
        "",
    ]


def test_elsewhere_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream, clock = io.StringIO(), Clock()
    progress = StartProgress(["m"], stream=stream, clock=clock)
    for _ in range(25):
        clock.now += 1.0
        progress.warming(int(clock.now), 40)
    progress.over()
    assert stream.getvalue() == ""
    assert caplog.messages == ["warming up: 5 %, 2 of 40", "warming up: 30 %, 12 of 40", "warming up: 55 %, 22 of 40"]
    assert LINE_S == 10.0
