"""Steps, one after the other or one ahead: planned, launched, and committed when their ids have arrived.

Owns the order of these and who is in what is in flight. Knows no policy (scheduler), no tensors (runner), no messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic

from aiexport_edge.engine.core.commit import commit
from aiexport_edge.engine.core.plan import Launched, StepPlan, StepRunner
from aiexport_edge.engine.core.protocol import StepReport
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.suspects import Suspects


@dataclass(frozen=True, slots=True)
class _Flight(Generic[Launched]):
    """A step that has been launched and not committed."""

    plan: StepPlan
    handles: list[int]
    launched: Launched


class Pipeline(Generic[Launched]):
    """Drives a scheduler and a runner. `suspects` always names everybody in a step that is in flight."""

    def __init__(self, *, scheduler: Scheduler, runner: StepRunner[Launched], suspects: Suspects) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._suspects = suspects
        self._flight: _Flight[Launched] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is something to `advance`."""
        return self._flight is not None or bool(self._scheduler.requests)

    def advance(self) -> StepReport | None:
        """Launch the next step, then commit the one that is in flight: what that has brought, or None if none was.

        Where the runner does not overlap steps, the step that is launched is the one that is committed.
        """
        before, plan = self._flight, self._scheduler.plan()
        assert before is not None or plan.models, "there are requests, but none can run"
        flight = self._launch(plan) if plan.models else None
        report = None if before is None else self._land(before, flight)
        if flight is not None:
            self._runner.draw(flight.launched)
            if not self._runner.overlaps:
                report, flight = self._land(flight, None), None
        self._flight = flight
        return report

    def suspect(self, handle: int) -> None:
        """What happens next may be due to this request."""
        self._suspects.write([*self._handles(), handle])

    def absolve(self) -> None:
        """It was not: nobody is suspected but who is in flight."""
        self._suspects.write(self._handles())

    def _launch(self, plan: StepPlan) -> _Flight[Launched]:
        handles = [chunk.request.handle for model in plan.models for chunk in model.chunks]
        encoding = [encode.request.handle for model in plan.models for encode in model.encodes]
        if encoding:
            handles = list({*handles, *encoding})
        self._suspects.write(list({*self._handles(), *handles}) if self._flight is not None else handles)
        return _Flight(plan, handles, self._runner.launch(plan))

    def _land(self, flight: _Flight[Launched], after: _Flight[Launched] | None) -> StepReport:
        report = commit(self._scheduler, flight.plan, self._runner.collect(flight.launched))
        self._suspects.write([] if after is None else after.handles)
        return report

    def _handles(self) -> list[int]:
        return [] if self._flight is None else self._flight.handles
