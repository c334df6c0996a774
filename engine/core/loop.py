"""The core's loop: receive, advance by a step, send; until the parent says so or is gone.

Owns the order of these and the counters that go out with them. Knows no policy (scheduler), no tensors (runner), no
text, and not how steps overlap (pipeline). A bug in any of them ends the process: the parent starts another and resumes
what ran.
"""

from __future__ import annotations

import time
from typing import Generic

from aiexport_edge.engine.core.channel import Channel, ChannelClosed
from aiexport_edge.engine.core.commit import end_of
from aiexport_edge.engine.core.constraint import Constraint
from aiexport_edge.engine.core.grammars import Grammars
from aiexport_edge.engine.core.pipeline import Pipeline
from aiexport_edge.engine.core.plan import Launched, StepRunner
from aiexport_edge.engine.core.protocol import (
    AbortRequest,
    AddRequest,
    AddVocabulary,
    CoreStats,
    Finished,
    FinishReason,
    FinishRequest,
    Shutdown,
    StepReport,
    ToCore,
    decode_to_core,
    encode_from_core,
)
from aiexport_edge.engine.core.request import Status, make_request
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.suspects import Suspects

_STATS_PERIOD_S = 0.1
_GRAMMAR_WAIT_S = 0.01  # messages wait so long at most behind a grammar that is being compiled


class StepLoop(Generic[Launched]):
    """Drives one runner from one channel."""

    def __init__(
        self, *, channel: Channel, scheduler: Scheduler, runner: StepRunner[Launched], suspects: Suspects
    ) -> None:
        self._channel = channel
        self._scheduler = scheduler
        self._page_bytes = runner.page_bytes
        self._pipeline = Pipeline(scheduler=scheduler, runner=runner, suspects=suspects)
        self._grammars = Grammars()
        self._finished: list[Finished] = []  # ends that no step brought, for the next report
        self._num_added = 0
        self._num_steps = 0
        self._stats_at = 0.0

    def run(self) -> None:
        """Until `Shutdown`, or until the parent has closed its end."""
        try:
            while self._receive():
                self._step()
        except ChannelClosed:
            return

    def stats(self) -> CoreStats:
        """The state of the core now."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        running, waiting = [0] * len(scheduler.tokens_per_page), [0] * len(scheduler.tokens_per_page)
        for request in scheduler.requests.values():
            (running if request.status is Status.RUNNING else waiting)[request.model] += 1
        return CoreStats(
            steps=self._num_steps,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_total=pool.num_total,
            pages_used=pool.num_used,
            pages_cached=pool.num_cached,
            pages_free=pool.num_free,
            page_bytes=self._page_bytes,
            preemptions=scheduler.num_preemptions,
            model_running=running,
            model_waiting=waiting,
            model_prompt_tokens=list(scheduler.num_prompt_tokens),
            model_cached_tokens=list(scheduler.num_cached_tokens),
            model_output_tokens=list(scheduler.num_output_tokens),
            model_guessed_tokens=list(scheduler.num_guessed_tokens),
            model_accepted_tokens=list(scheduler.num_accepted_tokens),
        )

    def _receive(self) -> bool:
        """Take what has arrived, waiting for it when there is nothing to do; False to end."""
        self._take_prepared()
        for body in self._channel.receive(wait=not (self._pipeline.busy or self._grammars.busy)):
            for message in decode_to_core(body):
                if isinstance(message, Shutdown):
                    return False
                self._take(message)
        return True

    def _take(self, message: ToCore) -> None:
        scheduler = self._scheduler
        if isinstance(message, AddVocabulary):
            self._grammars.learn(message)
        elif isinstance(message, AddRequest):
            if message.grammar is None:
                self._add(message, None)
            else:
                self._grammars.submit(message)
        elif isinstance(message, AbortRequest | FinishRequest):
            request_or_none = scheduler.requests.get(message.handle)  # None: it ended while the message was on its way
            if request_or_none is not None:
                scheduler.finish(request_or_none)
            elif not self._grammars.withdraw(message.handle):
                return
            if isinstance(message, AbortRequest):
                self._finished.append(Finished(message.handle, FinishReason.ABORTED))

    def _take_prepared(self) -> None:
        """Requests whose grammars are there; waits for one a little where there is nothing else to do."""
        if not self._grammars.busy:
            return
        for prepared in self._grammars.ready(at_most_s=0.0 if self._pipeline.busy else _GRAMMAR_WAIT_S):
            if prepared.constraint is None:
                self._finished.append(Finished(prepared.message.handle, FinishReason.ABORTED))
            elif prepared.is_whole:
                self._finished.append(Finished(prepared.message.handle, FinishReason.END_TURN))
            else:
                self._add(prepared.message, prepared.constraint)

    def _add(self, message: AddRequest, constraint: Constraint | None) -> None:
        self._pipeline.suspect(message.handle)  # one that cannot even be added must not kill every core
        merge_size = self._scheduler.pictures.merge_size(message.model) if message.images else 1
        request = make_request(message, arrival=self._num_added, merge_size=merge_size)
        request.constraint = constraint
        self._num_added += 1
        reason = end_of(request)
        if reason is None:
            self._scheduler.add(request)
        else:
            self._finished.append(Finished(request.handle, reason))
        self._pipeline.absolve()

    def _step(self) -> None:
        report = self._pipeline.advance() if self._pipeline.busy else None
        self._num_steps += report is not None
        self._report(report or StepReport([], [], []))

    def _report(self, report: StepReport) -> None:
        """Send what a step brought and what ended besides; nothing when there is nothing to say."""
        now = time.monotonic()
        stats = None
        if now - self._stats_at >= _STATS_PERIOD_S or not self._pipeline.busy:
            stats = self.stats()
            self._stats_at = now
        finished = self._finished + report.finished
        self._finished = []
        if report.started or report.tokens or finished or stats is not None:
            self._channel.send(encode_from_core(StepReport(report.started, report.tokens, finished, stats)))
