"""How many requests of batches are kept waiting at the engines, for one model: as many as keep them full, no more.

An engine that is full takes the next request when one ends, and batch requests wait behind all interactive ones. What
keeps it full is that a few of ours are always waiting: `window` of them. It grows while the engine takes them all
between two looks, shrinks while it takes none, and closes for a while when the engine refuses one. What runs is the
engine's to decide; what waits is far less than its queue, or a workspace's share of it, can hold.
"""

from __future__ import annotations

FIRST_WINDOW = 4
MAX_WINDOW = 64
_FIRST_CLOSED_S = 0.25
_LAST_CLOSED_S = 5.0
_SHRINK_S = 1.0


class Pace:
    """Owns the window. Times are seconds of one steady clock, which the caller reads."""

    def __init__(self, max_window: int = MAX_WINDOW) -> None:
        self._max_window = max(1, min(max_window, MAX_WINDOW))
        self.window = min(FIRST_WINDOW, self._max_window)
        self.open_at = 0.0
        self._closed_s = _FIRST_CLOSED_S
        self._filled = False  # at the last look
        self._shrink_at = 0.0

    def look(self, num_waiting: int, now: float) -> None:
        """Follows the engine: so many wait of what has been sent up to the last look."""
        if num_waiting == 0 and self._filled:  # it has taken all: it may have stood idle
            self.window = min(2 * self.window, self._max_window)
            self._shrink_at = now + _SHRINK_S
        elif num_waiting < self.window:
            self._shrink_at = now + _SHRINK_S
        elif now >= self._shrink_at:
            self.window = max(1, self.window - max(1, self.window // 4))
            self._shrink_at = now + _SHRINK_S
        self._filled = False

    def room(self, num_waiting: int, now: float) -> int:
        """How many more may be sent to wait."""
        return 0 if now < self.open_at else max(0, self.window - num_waiting)

    def sent(self, num_waiting: int) -> None:
        """So many wait after requests have been sent."""
        self._filled = num_waiting >= self.window

    def refused(self, now: float, retry_after: float | None) -> None:
        """The engine has no room, or is not there. Each refusal in a row closes for longer; one that comes while it is
        closed already says nothing new."""
        if now < self.open_at:
            return
        self.window = max(1, self.window // 2)
        self.open_at = now + min(max(self._closed_s, retry_after or 0.0), _LAST_CLOSED_S)
        self._closed_s = min(2 * self._closed_s, _LAST_CLOSED_S)
        self._filled = False

    def started(self) -> None:
        """The engine has begun one."""
        self._closed_s = _FIRST_CLOSED_S
