"""Whether an engine that is connected is fit to be given work: outlier ejection, as a circuit breaker per engine.

    healthy ──failures in a row, or losses in a short time──▶ ejected for a while ──▶ on trial: one request at a time
       ▲                                                          ▲                        │ answered: healthy
       └──────────────────────────────────────────────────────────┴────────────────────────┘ not: for twice as long

After Envoy's outlier detection (consecutive errors, ejection times that grow), with a trial before an engine gets its
full share again. It does not know the other engines: whoever asks sees to it that the last one is not given up. A
refusal for want of room is no failure: such an engine is only asked last for a moment. Times are seconds of a steady
clock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from enum import Enum

MAX_FAILURES = 3  # answers in a row that did not come, came late, or said that the engine is broken
MAX_LOSSES = 3  # connections lost with requests on them …
LOSSES_S = 60.0  # … within so long
FIRST_EJECTION_S = 5.0
LAST_EJECTION_S = 300.0
FORGIVEN_S = 300.0  # healthy for so long: the next ejection is one step shorter
FULL_S = 0.5  # after a refusal for want of room


class Fitness(Enum):
    """What may be asked of an engine."""

    HEALTHY = "healthy"
    TRIAL = "trial"
    EJECTED = "ejected"


class Outlier:
    """The record of one engine."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.num_ejections = 0  # since this process began
        self._now = now
        self._failures = 0  # in a row
        self._losses: deque[float] = deque(maxlen=MAX_LOSSES)
        self._steps = 0  # how often it was ejected, less what has been forgiven
        self._until = 0.0  # of the ejection; 0: none
        self._healthy_since = now()
        self._trials = 0  # requests that are on trial just now
        self._full_until = 0.0

    @property
    def fitness(self) -> Fitness:
        if not self._until:
            return Fitness.HEALTHY
        return Fitness.EJECTED if self._now() < self._until else Fitness.TRIAL

    @property
    def admits(self) -> bool:
        """Whether one more request may be sent."""
        fitness = self.fitness
        return fitness is Fitness.HEALTHY or (fitness is Fitness.TRIAL and not self._trials)

    @property
    def is_full(self) -> bool:
        """It has just said that it has no room."""
        return self._now() < self._full_until

    @property
    def ejected_for(self) -> float:
        """Seconds that are left of its ejection."""
        return max(0.0, self._until - self._now())

    def sent(self) -> bool:
        """A request is sent. Returns whether it is a trial (one sent in spite of an ejection, for want of any other
        engine, is one too); `answered`, `failed` or `withdrawn` follows."""
        on_trial = self.fitness is not Fitness.HEALTHY
        self._trials += on_trial
        return on_trial

    def answered(self, *, on_trial: bool) -> None:
        """The engine has said yes or no as it should."""
        self._trials -= on_trial
        self._failures = 0
        if on_trial and self._until:
            self._until = 0.0
            self._healthy_since = self._now()
            self._losses.clear()

    def failed(self, *, on_trial: bool) -> None:
        """No answer, a late one, or one that says that the engine is broken."""
        self._trials -= on_trial
        self._failures += 1
        fitness = self.fitness
        if fitness is Fitness.TRIAL or (fitness is Fitness.HEALTHY and self._failures >= MAX_FAILURES):
            self._eject()

    def withdrawn(self, *, on_trial: bool) -> None:
        """The request was taken back before there was an answer."""
        self._trials -= on_trial

    def full(self, seconds: float = 0.0) -> None:
        """It has no room, for about so long."""
        self._full_until = self._now() + min(max(seconds, FULL_S), FIRST_EJECTION_S)

    def lost(self) -> None:
        """The connection broke with requests on it."""
        now = self._now()
        self._losses.append(now)
        fitness = self.fitness
        often = len(self._losses) == MAX_LOSSES and now - self._losses[0] <= LOSSES_S
        if fitness is Fitness.TRIAL or (fitness is Fitness.HEALTHY and often):
            self._eject()

    def _eject(self) -> None:
        now = self._now()
        if not self._until:
            self._steps = max(0, self._steps - int((now - self._healthy_since) / FORGIVEN_S))
        self._until = now + min(FIRST_EJECTION_S * 2**self._steps, LAST_EJECTION_S)
        self._steps += 1
        self._failures = 0
        self._losses.clear()
        self.num_ejections += 1
