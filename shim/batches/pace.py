"""How many requests of batches are kept at the engines, for one model: as many as keep them full, and no more.

An engine that is full takes the next request when one ends, and batch requests wait behind all interactive ones. What
keeps it full is that a few of ours are always waiting: `window` of them. It grows while the engine takes them all
between two looks, shrinks while it takes none, and closes for a while when the engine refuses one. What waits is far
less than the engine's queue, or a workspace's share of it, can hold.

Requests that run share every step of the engine with the interactive ones, and where that makes steps much longer (it
does on a processor, hardly on a GPU), these would be slowed down. So while there are interactive requests, the number
in flight (`limit`) is brought down until a step takes at most `SLOWER` times what the quickest took, and up again as
far as that allows; without them there is no limit.
"""

from __future__ import annotations

import math

FIRST_WINDOW = 4
MAX_WINDOW = 64
_FIRST_CLOSED_S = 0.25
_LAST_CLOSED_S = 5.0
_SHRINK_S = 1.0
SLOWER = 2.0
_QUICK_STEP_S = 0.010  # steps that are no longer delay nobody
_ALONE_S = 2.0  # after the last interactive request
_SMOOTHING = 0.05
_LEAST = 4  # in flight, whatever a step takes


class Pace:
    """Owns the window. Times are seconds of one steady clock, which the caller reads."""

    def __init__(self, max_window: int = MAX_WINDOW) -> None:
        self._max_window = max(1, min(max_window, MAX_WINDOW))
        self.window = min(FIRST_WINDOW, self._max_window)
        self.limit = math.inf
        self.open_at = 0.0
        self._closed_s = _FIRST_CLOSED_S
        self._filled = False  # at the last look
        self._shrink_at = 0.0
        self._num_steps = 0
        self._step_s = 0.0  # between two tokens of a request, smoothed
        self._quickest_s = math.inf
        self._alone_at = 0.0

    def step(self, seconds: float) -> None:
        """So much time lay between two tokens of a request."""
        self._num_steps += 1
        self._step_s += (seconds - self._step_s) * max(_SMOOTHING, 1 / self._num_steps)
        if self._num_steps * _SMOOTHING >= 1:  # fewer may have come in one piece
            self._quickest_s = min(self._quickest_s, self._step_s)

    def heed(self, num_in_flight: int, *, interactive: bool, now: float) -> None:
        """Now and then: so many are in flight, beside interactive requests or alone."""
        if interactive:
            self._alone_at = now + _ALONE_S
        if now >= self._alone_at:
            self.limit = math.inf
        elif self._step_s > max(SLOWER * self._quickest_s, _QUICK_STEP_S):
            if num_in_flight <= self.limit:  # else what was too many has still to end
                self.limit = max(_LEAST, num_in_flight // 2)
        elif num_in_flight >= self.limit:
            self.limit += max(1, self.limit // 8)

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

    def room(self, num_waiting: int, num_in_flight: int, now: float) -> int:
        """How many more may be sent; those in flight are the waiting ones and those that run."""
        if now < self.open_at:
            return 0
        return int(max(0, min(self.window - num_waiting, self.limit - num_in_flight)))

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
