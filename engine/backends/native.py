"""The native backend: owns the core child process, watches it, restarts it and gives it its requests again.

Knows token ids only. The core holds no state that cannot be made again from here: a request's prompt and the ids that
it has produced so far. When a core dies, a new one is started and every live request is submitted to it with those
ids as its forced output, so that it goes on where it was. Requests that were in the step in which the core died are
suspects: they run on probation (in steps of their own), and one that ends two cores in a row without a token in
between is failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiexport_edge.engine.backends.base import (
    BackendRequest,
    BackendStats,
    ModelState,
    ModelStatus,
    RequestListener,
    StartListener,
)
from aiexport_edge.engine.backends.core_process import CoreProcess
from aiexport_edge.engine.backends.counters import LifeCounters
from aiexport_edge.engine.backends.spawn import CORE_COMMAND
from aiexport_edge.engine.core.protocol import (
    AbortRequest,
    AddRequest,
    AddVocabulary,
    CoreConfig,
    FinishReason,
    FinishRequest,
    LoadFailed,
    Loading,
    Ready,
    StepReport,
    ToCore,
    Warming,
    decode_from_core,
    encode_to_core,
)

if TYPE_CHECKING:
    from aiexport_edge.engine.backends.vllm.protocol import WorkerConfig

log = logging.getLogger(__name__)

MAX_DEATHS = 2
# A request can bring SIGKILL upon its core by exhausting memory alone; mostly it comes from a person. So it takes more.
MAX_KILLS = 5
STEP_TIMEOUT_S = 300.0
MAX_CRASHES = 3  # cores in a row that ended by themselves before they were ready: then models count as failed
PATIENCE_S = 5.0  # for a core that has closed its socket to be gone
BACKOFF_S = (0.0, 0.0, 0.25, 0.5, 1.0, 2.0, 5.0)


@dataclass(slots=True, eq=False)
class _Live:
    """A request that has not ended. `output` has every id so far, forced ones first."""

    request: BackendRequest
    listener: RequestListener
    output: array[int]
    started: bool = False
    deaths: int = 0
    kills: int = 0
    probation: bool = False


class NativeBackend:
    """See the module. `first` is a core already spawned and configured, taken for the first life. A core that is silent
    for `step_timeout_s` while it has work hangs, and is ended. What `spawn` makes speaks the core's messages, whatever
    is behind it (`backends/vllm`); by default it runs `command`.
    """

    def __init__(
        self,
        config: CoreConfig | WorkerConfig,
        *,
        first: CoreProcess | None = None,
        command: Sequence[str] = CORE_COMMAND,
        spawn: Callable[[], CoreProcess] | None = None,
        step_timeout_s: float = STEP_TIMEOUT_S,
        progress: StartListener | None = None,
    ) -> None:
        self._progress = progress
        self._config = config
        self._step_timeout_s = step_timeout_s
        self._spawn = spawn or (lambda: CoreProcess(command))
        self._next = first
        self._core: CoreProcess | None = None
        self._serving = False  # the core has said that it is ready
        self._was_ready = False  # some core has
        self._statuses = [ModelStatus(ModelState.LOADING) for _ in config.models]
        self._status_callbacks: list[Callable[[], None]] = []
        self._live: dict[int, _Live] = {}
        self._next_handle = 1
        self._outgoing: list[ToCore] = []
        self._introduced: set[int] = set()  # models whose vocabulary this core has
        self._counters = LifeCounters()
        self._restarts = 0
        self._failures = 0  # lives in a row that brought no token
        self._crashes = 0  # of these, in a row, ends that were not SIGKILL and before Ready
        self._blind_crashes = 0  # in a row, without a token: ends with requests there, but none in a step
        self._ended = asyncio.Event()
        self._hung = False  # the core was ended because it was silent
        self._num_frames = 0
        self._load_error = ""
        self._last_word = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------------------------------------------ what is asked

    async def start(self) -> None:
        self._task = asyncio.create_task(self._watch(), name="core")

    async def stop(self) -> None:
        self._live.clear()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for core in (self._core, self._next):
            if core is not None:
                await core.end()
        self._core = self._next = None

    def submit(self, request: BackendRequest, listener: RequestListener) -> int:
        handle = self._next_handle
        self._next_handle += 1
        output = array("I")
        output.frombytes(request.output_ids)
        live = self._live[handle] = _Live(request, listener, output)
        if self._serving:
            self._add(handle, live)
        return handle

    def abort(self, handle: int) -> None:
        if self._live.pop(handle, None) is not None and self._serving:
            self._send(AbortRequest(handle))

    def finish(self, handle: int) -> None:
        if self._live.pop(handle, None) is not None and self._serving:
            self._send(FinishRequest(handle))

    def statuses(self) -> list[ModelStatus]:
        return self._statuses

    def stats(self) -> BackendStats:
        waiting = [0] * len(self._config.models)
        for live in self._live.values():
            waiting[live.request.model] += 1
        pid = self._core.pid if self._core is not None else 0
        return BackendStats(self._counters.total(waiting), self._restarts, pid)

    def on_status(self, callback: Callable[[], None]) -> None:
        self._status_callbacks.append(callback)

    # ------------------------------------------------------------------------------------------------ lives of cores

    async def _watch(self) -> None:
        """One core after the other, until `stop`. What cannot be loaded at the first start is not tried again: that is
        for the operator to mend. Later it is, because it once could be.
        """
        while True:
            self._ended.clear()
            self._hung = False
            self._load_error = ""
            core, self._next = self._next, None
            try:
                if core is None:
                    core = self._spawn()
                    core.configure(self._config)
                self._core = core
                await core.connect(self._on_frame, self._ended.set)
                await self._guard(core)
            except OSError as error:  # no process, no descriptors, no memory: passing faults
                log.error("the core process cannot be started: %s", error)
            await self._outlive(core)
            if self._load_error:
                self._fail(self._load_error)
                if not self._was_ready:
                    return
            elif self._crashes >= MAX_CRASHES:
                self._fail("the core process ends again and again without a word; the engine's log says more.")
            delay = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
            self._failures += 1
            self._restarts += 1
            await asyncio.sleep(delay)

    async def _guard(self, core: CoreProcess) -> None:
        """Returns when the core has ended; ends it when it hangs. A step that takes long tells of its end: so silence
        is one step, or none. Time in which this process itself stood still does not count.
        """
        tick = min(1.0, self._step_timeout_s / 4)
        silent_s, num_frames = 0.0, self._num_frames
        while not self._ended.is_set():
            began = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), tick)
            has_work = self._serving and bool(self._live)
            if not has_work or self._num_frames != num_frames:
                silent_s, num_frames = 0.0, self._num_frames
                continue
            silent_s += min(time.monotonic() - began, 2 * tick)
            if silent_s >= self._step_timeout_s and not self._hung:
                log.error("core %d is silent for %.0f s while it has work; it is ended", core.pid, silent_s)
                self._hung = True
                core.kill()

    async def _outlive(self, core: CoreProcess | None) -> None:
        """Buries a core (None: there was none to be had) and settles what that means for its requests."""
        if self._progress is not None:
            self._progress.over()
        was_serving, self._serving = self._serving, False
        self._outgoing.clear()
        suspects: list[int] = []
        status = 1
        if core is not None:
            suspects, pid, status = core.in_step(), core.pid, await core.end(patience_s=PATIENCE_S)
            self._core = None
            log.error(
                "core %d ended with status %d; %d requests in its step, %.3f s since it last reported",
                pid,
                status,
                len(suspects),
                time.monotonic() - self._last_word,
            )
        self._counters.bury()
        killed = status == -signal.SIGKILL and not self._hung
        self._crashes += not killed
        self._settle(suspects, killed=killed)
        if was_serving and not killed and not suspects and self._live:
            self._blind_crashes += 1
            if self._blind_crashes >= MAX_CRASHES:
                # Some request does it, between steps, and nobody knows which.
                for handle in list(self._live):
                    self._give_up(handle)

    def _settle(self, suspects: list[int], *, killed: bool) -> None:
        """After a core's death: counts it against those in its step, and ends what needs no other core."""
        for handle in suspects:
            live = self._live.get(handle)
            if live is None:
                continue
            live.probation = True
            live.kills += killed
            live.deaths += not killed
            if live.deaths >= MAX_DEATHS or live.kills >= MAX_KILLS:
                self._give_up(handle)
        for handle, live in list(self._live.items()):
            # Its last token had been told, its end had not.
            if live.output and live.output[-1] in live.request.stop_ids:
                del self._live[handle]
                live.listener.finished(FinishReason.END_TURN)
            elif len(live.output) >= live.request.max_tokens:
                del self._live[handle]
                live.listener.finished(FinishReason.MAX_TOKENS)

    def _give_up(self, handle: int) -> None:
        live = self._live.pop(handle)
        log.error("the request with handle %d is failed: cores end again and again while they have it", handle)
        live.listener.failed("The engine failed again and again while it worked on this request, so it is given up.")

    def _fail(self, message: str) -> None:
        self._set_statuses([ModelStatus(ModelState.FAILED, message)] * len(self._config.models))

    def _set_statuses(self, statuses: list[ModelStatus]) -> None:
        self._statuses = statuses
        for callback in self._status_callbacks:
            callback()

    # ------------------------------------------------------------------------------------------------ messages

    def _send(self, message: ToCore) -> None:
        """Everything of one turn of the event loop goes out as one frame at its end."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(message)

    def _add(self, handle: int, live: _Live) -> None:
        constraint, model = live.request.constraint, live.request.model
        if constraint is not None and model not in self._introduced:
            self._introduced.add(model)
            vocabulary = constraint.vocabulary
            self._send(AddVocabulary(model, vocabulary.tokens, sorted(vocabulary.stop_ids)))
        self._send(_add(handle, live))

    def _flush(self) -> None:
        if self._outgoing and self._core is not None:
            self._core.write(encode_to_core(self._outgoing))
        self._outgoing = []

    def _on_frame(self, body: bytes) -> None:
        message = decode_from_core(body)
        self._last_word = time.monotonic()
        self._num_frames += 1
        match message:
            case StepReport():
                self._on_step(message)
            case Ready():
                self._on_ready(message)
            case Loading():
                if self._progress is not None:
                    self._progress.weights(message.model, message.done, message.total)
            case Warming():
                if self._progress is not None:
                    self._progress.warming(message.done, message.total)
            case LoadFailed():
                self._load_error = message.message
                log.error("core: %s", message.message)

    def _on_ready(self, ready: Ready) -> None:
        if self._progress is not None:
            self._progress.over()
        self._serving = self._was_ready = True
        self._introduced.clear()
        self._crashes = 0
        self._counters.report(ready.stats)
        capacities = {model.model: model.capacity_tokens for model in ready.models}
        for handle, live in list(self._live.items()):
            capacity = capacities.get(live.request.model, 0)
            # A pool sized by the memory that is free can be smaller in this core than in the one before.
            if capacity and len(live.request.prompt_ids) // 4 + live.request.max_tokens > capacity:
                del self._live[handle]
                live.listener.failed(
                    f"The engine has started again with room for {capacity} tokens, fewer than this needs."
                )
            else:
                self._add(handle, live)
        self._set_statuses(
            [
                ModelStatus(ModelState.READY, capacity_tokens=capacities.get(index, 0), adapters=ready.adapters)
                for index in range(len(self._config.models))
            ]
        )

    def _on_step(self, report: StepReport) -> None:
        if report.stats is not None:
            self._counters.report(report.stats)
        for started in report.started:
            live = self._live.get(started.handle)
            if live is not None and not live.started:
                live.started = True
                live.listener.started(started.cached_tokens)
        if report.tokens:
            self._failures = self._blind_crashes = 0
        for tokens in report.tokens:
            live = self._live.get(tokens.handle)
            if live is not None:
                if live.probation:  # it was in a dead core's step
                    live.probation = False
                    live.deaths = live.kills = 0
                live.output.extend(tokens.ids)
                live.listener.tokens(tokens.ids)
        for finished in report.finished:
            live = self._live.pop(finished.handle, None)
            if live is None:
                continue
            if finished.reason == FinishReason.FAULTY:
                name = self._config.models[live.request.model].name
                log.error("model %s: a request's logits are not numbers; are its weights, its dtype sound?", name)
                live.listener.failed(
                    f"Model {name} answered with what is not a number, so the request cannot go on; its weights may be "
                    "damaged, or its dtype too narrow for them."
                )
            elif finished.reason == FinishReason.FAILED:
                live.listener.failed("The engine could not go on with this request; its operator's log says why.")
            else:
                live.listener.finished(FinishReason(finished.reason))


def _add(handle: int, live: _Live) -> AddRequest:
    request = live.request
    return AddRequest(
        handle=handle,
        model=request.model,
        prompt_ids=request.prompt_ids,
        output_ids=live.output.tobytes(),
        max_tokens=request.max_tokens,
        stop_ids=list(request.stop_ids),
        sampling=request.sampling,
        tenant=request.tenant,
        weight=request.weight,
        salt=request.salt,
        priority=request.priority,
        probation=live.probation,
        grammar=None if request.constraint is None else request.constraint.grammar,
        document_prefix=b"" if request.constraint is None else request.constraint.prefix,
        images=list(request.images),
        adapter=request.adapter,
    )
