"""Requests on a runner as the core's loop runs them: scheduler, page pool, pipeline; without processes and messages."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence

from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pipeline import Pipeline
from aiexport_edge.engine.core.plan import StepPlan, StepResult
from aiexport_edge.engine.core.protocol import AddRequest, Priority, Sampling, StepReport, pack_ids
from aiexport_edge.engine.core.request import make_request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.step_sampler import PendingStep
from aiexport_edge.engine.core.suspects import SUSPECTS_BYTES, Suspects
from benchmarks.gpu.sequences import GREEDY

_handles = itertools.count(1)  # never the same twice: a runner knows a request by its handle


class TimedRunner:
    """A runner that calls `mark` before and after it launches a step, and counts the time spent waiting for ids.

    Steps overlap only if `overlaps`, whatever the runner can.
    """

    def __init__(self, runner: Runner, *, overlaps: bool, mark: Callable[[], None]) -> None:
        self.overlaps = overlaps and runner.overlaps
        self.num_pages = runner.num_pages
        self.page_bytes = runner.page_bytes
        self.max_step_tokens = runner.max_step_tokens
        self.tokens_per_page = runner.tokens_per_page
        self.weight_bytes = runner.weight_bytes
        self.pace = runner.pace
        self.draft_cost = runner.draft_cost
        self.adapter_room = runner.adapter_room
        self.eyes = runner.eyes
        self.picture_bytes = runner.picture_bytes
        self.waited_s = 0.0
        self._runner = runner
        self._mark = mark

    def launch(self, plan: StepPlan) -> PendingStep:
        self._mark()
        pending = self._runner.launch(plan)
        self._mark()
        return pending

    def draw(self, launched: PendingStep) -> None:
        self._runner.draw(launched)

    def collect(self, launched: PendingStep) -> StepResult:
        began = time.perf_counter()
        launched.wait()
        self.waited_s += time.perf_counter() - began
        return self._runner.collect(launched)


class Served:
    """A scheduler and a pipeline over `runner`. `ids` are what each request has answered, by handle."""

    def __init__(
        self, runner: Runner, *, overlaps: bool = True, drafts: bool = False, mark: Callable[[], None] = lambda: None
    ) -> None:
        self.ids: dict[int, list[int]] = {}
        self.runner = TimedRunner(runner, overlaps=overlaps, mark=mark)
        self.scheduler = Scheduler(
            PagePool(runner.num_pages),
            revisions=["random"] * runner.num_models,
            tokens_per_page=runner.tokens_per_page,
            max_num_running=runner.max_num_running,
            max_step_tokens=runner.max_step_tokens,
            batch_floor_share=0.0,
            pace=runner.pace,
            draft_cost=runner.draft_cost if drafts else None,
        )
        self._memory = os.memfd_create("aiexport-edge-benchmark")
        os.ftruncate(self._memory, SUSPECTS_BYTES)
        self._suspects = Suspects(self._memory)
        self._pipeline = Pipeline(scheduler=self.scheduler, runner=self.runner, suspects=self._suspects)

    @property
    def busy(self) -> bool:
        """Whether there is something to `advance`."""
        return self._pipeline.busy

    def add(self, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling = GREEDY) -> int:
        """Queue a request that shares no page with another; its handle."""
        handle = next(_handles)
        message = AddRequest(
            handle=handle,
            model=0,
            prompt_ids=pack_ids(list(prompt)),
            output_ids=b"",
            max_tokens=max_tokens,
            stop_ids=[],
            sampling=sampling,
            tenant="",
            weight=1.0,
            salt=b"%d" % handle,
            priority=Priority.INTERACTIVE,
        )
        self.scheduler.add(make_request(message, arrival=handle))
        return handle

    def advance(self) -> StepReport:
        """One turn of the loop: what the step that was committed brought, if one was."""
        report = self._pipeline.advance() or StepReport([], [], [])
        for tokens in report.tokens:
            self.ids.setdefault(tokens.handle, []).extend(tokens.ids)
        return report

    def prefill(self) -> None:
        """Advance until every request has answered with an id."""
        waiting = set(self.scheduler.requests)
        while waiting:
            waiting -= {tokens.handle for tokens in self.advance().tokens}

    def end(self) -> None:
        """End every request, and let what is in flight land."""
        for request in list(self.scheduler.requests.values()):
            self.scheduler.finish(request)
        while self._pipeline.busy:
            self.advance()
        self._suspects.close()
        os.close(self._memory)
