"""How far a start is, for whoever watches it: a bar on a terminal, a line now and then elsewhere.

Owns what is written and when; a start that takes a moment writes nothing. Knows no core.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

log = logging.getLogger(__name__)

QUIET_S = 2.0  # a start that is over by then says nothing
BAR_S, LINE_S = 0.1, 10.0  # between two
WIDTH = 30
GIB = 1 << 30


class StartProgress:
    """Told by a backend: `weights` while they are read, `warming` after that, `over` when it serves or has failed."""

    def __init__(
        self,
        models: Sequence[str],
        *,
        stream: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = models
        self._stream = stream
        self._clock = clock
        self._on_terminal = stream.isatty()
        self._next = clock() + QUIET_S
        self._is_shown = False  # a bar stands on the terminal's last line

    def weights(self, model: int, done: int, total: int) -> None:
        """`done` of `total` bytes of a model are read."""
        self._tell(f"model {self._models[model]}: weights", done, total, f"{done / GIB:.1f} of {total / GIB:.1f} GiB")

    def warming(self, done: int, total: int) -> None:
        """`done` of `total` parts of the warm-up."""
        self._tell("warming up", done, total, f"{done} of {total}")

    def over(self) -> None:
        """There is nothing more to tell of this start."""
        if self._is_shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._is_shown = False

    def _tell(self, what: str, done: int, total: int, detail: str) -> None:
        now = self._clock()
        if now < self._next:
            return
        share = done / total if total else 1.0
        if self._on_terminal:
            filled = round(WIDTH * share)
            self._stream.write(f"\r\x1b[K{what} [{'#' * filled}{'.' * (WIDTH - filled)}] {share:4.0%} {detail}")
            self._stream.flush()
            self._is_shown = True
            self._next = now + BAR_S
        else:
            log.info("%s: %.0f %%, %s", what, 100 * share, detail)
            self._next = now + LINE_S
