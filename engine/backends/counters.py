"""Statistics over the lives of cores: each core counts from zero, what is told goes on. Owns the sums."""

from __future__ import annotations

import msgspec

from aiexport_edge.engine.core.protocol import CoreStats


class LifeCounters:
    """`report` what a core says, `bury` it when it ends; `total` is the gauges of now and the counters of all."""

    def __init__(self) -> None:
        self._now: CoreStats | None = None  # of this life
        self._past: CoreStats | None = None  # counters of the lives before, gauges 0

    def report(self, stats: CoreStats) -> None:
        """The core's latest word."""
        self._now = stats

    def bury(self) -> None:
        """The core is no more: its counters stay."""
        if self._now is None:
            return
        nobody = [0] * len(self._now.model_running)
        ended = msgspec.structs.replace(
            self._now,
            running=0,
            waiting=0,
            pages_used=0,
            pages_cached=0,
            pages_free=self._now.pages_total,
            model_running=nobody,
            model_waiting=nobody,
        )
        self._past = ended if self._past is None else _sum(ended, self._past)
        self._now = None

    def total(self, model_waiting: list[int]) -> CoreStats | None:
        """None before any core's first word. `model_waiting` counts where no core has spoken since the last one ended:
        then everybody waits.
        """
        if self._past is None:
            return self._now
        if self._now is None:
            return msgspec.structs.replace(self._past, waiting=sum(model_waiting), model_waiting=model_waiting)
        return _sum(self._now, self._past)


def _sum(stats: CoreStats, past: CoreStats) -> CoreStats:
    """`stats` with the counters of `past` added."""

    def added(name: str) -> list[int]:
        return [a + b for a, b in zip(getattr(stats, name), getattr(past, name), strict=True)]

    return msgspec.structs.replace(
        stats,
        steps=stats.steps + past.steps,
        preemptions=stats.preemptions + past.preemptions,
        model_prompt_tokens=added("model_prompt_tokens"),
        model_cached_tokens=added("model_cached_tokens"),
        model_output_tokens=added("model_output_tokens"),
        model_guessed_tokens=added("model_guessed_tokens"),
        model_accepted_tokens=added("model_accepted_tokens"),
    )
