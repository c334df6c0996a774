"""A worker's requests: taken from the parent's frames, handed to an async engine, their tokens committed and told.

Owns, for each request, what the native core's commit owns: ends, budgets, and the JSON guarantee, which does not lean
on the engine's masks. Knows no vLLM: the engine is an interface, which `engine.py` implements.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import msgspec

from aiexport_edge.engine.backends.vllm.gate import Gate
from aiexport_edge.engine.core.commit import end_of
from aiexport_edge.engine.core.grammars import Grammars, Prepared
from aiexport_edge.engine.core.protocol import (
    AbortRequest,
    AddRequest,
    AddVocabulary,
    CoreStats,
    Finished,
    FinishReason,
    FinishRequest,
    Started,
    StepReport,
    ToCore,
    Tokens,
)
from aiexport_edge.engine.core.request import Request, make_request
from aiexport_edge.engine.core.suspects import Suspects
from aiexport_edge.engine.structured.compile import MAX_KEPT

STATS_PERIOD_S = 0.1
GRAMMAR_POLL_S = 0.005
_END_OF_CUT = {False: FinishReason.END_TURN, True: FinishReason.MAX_TOKENS}


@dataclass(frozen=True, slots=True)
class Piece:
    """New ids of one request. `cached_tokens` of what it was asked to compute came from the prefix cache. `cut`: the
    engine has no room for more."""

    ids: Sequence[int]
    cached_tokens: int
    cut: bool = False


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine says of itself: steps and preemptions since it began, pages in all and in use."""

    steps: int
    preemptions: int
    pages_total: int
    pages_used: int
    page_bytes: int


class EngineDead(Exception):
    """The engine behind has ended; `by_kill` where it was killed, as a person or the system does."""

    def __init__(self, *, by_kill: bool) -> None:
        super().__init__()
        self.by_kill = by_kill


class RequestFailed(Exception):
    """The engine cannot go on with one request."""


class AsyncEngine(Protocol):
    """What makes tokens. Methods are for the event loop."""

    def generate(self, request: Request, message: AddRequest) -> AsyncGenerator[Piece, None]:
        """The output of `request` from `request.token_ids` on. Closing it frees what it holds. Raises `EngineDead` and
        `RequestFailed`."""
        ...

    async def learn(self, words: AddVocabulary) -> None:
        """What the model's ids spell, before the first request with a grammar."""

    async def announce(self, message: AddRequest) -> None:
        """A request with a grammar that no other has had will follow."""

    def load(self) -> EngineLoad:
        """As last heard."""
        ...


@dataclass(slots=True, eq=False)
class _Live:
    request: Request
    message: AddRequest
    task: asyncio.Task[None] | None = None


class Worker:
    """`send` takes a `StepReport`. `die` is told of what no request can go on after: `EngineDead`, or a bug."""

    def __init__(
        self,
        engine: AsyncEngine,
        gate: Gate,
        suspects: Suspects,
        *,
        send: Callable[[StepReport], None],
        die: Callable[[BaseException], None],
    ) -> None:
        self._engine = engine
        self._gate = gate
        self._suspects = suspects
        self._send = send
        self._die = die
        self._grammars = Grammars()
        self._announced: OrderedDict[bytes, None] = OrderedDict()  # digests of grammars, as many as are kept compiled
        self._announcing: set[int] = set()  # handles of requests whose grammar is being announced
        self._live: dict[int, _Live] = {}
        self._num_added = 0
        self._num_prompt_tokens = self._num_cached_tokens = self._num_output_tokens = 0
        self._report = StepReport([], [], [])
        self._is_flush_due = False
        self._stats_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_waiting_for_grammars = False

    def take(self, messages: list[ToCore]) -> None:
        """Everything of one frame."""
        for message in messages:
            match message:
                case AddRequest(grammar=None):
                    self._add(message, None)
                case AddRequest():
                    self._grammars.submit(message)
                    self._wait_for_grammars()
                case AddVocabulary():
                    self._grammars.learn(message)
                    self._start(self._engine.learn(message))
                case AbortRequest():
                    if self._withdraw(message.handle):
                        self._tell_end(message.handle, FinishReason.ABORTED)
                case FinishRequest():
                    self._withdraw(message.handle)
        self._pump()

    def stats(self) -> CoreStats:
        """The worker's state as a core says it."""
        load, running = self._engine.load(), len(self._gate.running)
        used = load.pages_used if running else 0  # what an idle engine holds is cached at most
        return CoreStats(
            steps=load.steps,
            running=running,
            waiting=self._gate.num_waiting,
            pages_total=load.pages_total,
            pages_used=used,
            pages_cached=0,
            pages_free=load.pages_total - used,
            page_bytes=load.page_bytes,
            preemptions=load.preemptions + self._gate.num_preemptions,
            model_running=[running],
            model_waiting=[self._gate.num_waiting],
            model_prompt_tokens=[self._num_prompt_tokens],
            model_cached_tokens=[self._num_cached_tokens],
            model_output_tokens=[self._num_output_tokens],
        )

    def heard(self) -> None:
        """The engine has told of its load: the parent hears of it too, so that it knows that steps are made."""
        if self._live:
            self._flush_soon()

    # ------------------------------------------------------------------------------------------------ what comes

    def _add(self, message: AddRequest, prepared: Prepared | None) -> None:
        # What pictures there are is for vLLM: positions are its own.
        request = make_request(msgspec.structs.replace(message, images=[]), arrival=self._num_added)
        self._num_added += 1
        reason = end_of(request)
        if prepared is not None:
            request.constraint = prepared.constraint
            if prepared.constraint is None:
                reason = FinishReason.ABORTED
            elif prepared.is_whole:
                reason = FinishReason.END_TURN
        if reason is None:
            self._live[request.handle] = _Live(request, message)
            self._gate.add(request)
        else:
            self._tell_end(request.handle, reason)

    def _wait_for_grammars(self) -> None:
        """Requests with a grammar go on when it is compiled, in a thread here and in the engine at the same time."""
        if not self._is_waiting_for_grammars:
            self._is_waiting_for_grammars = True
            self._start(self._take_prepared())

    async def _take_prepared(self) -> None:
        while self._grammars.busy:
            for prepared in self._grammars.ready(at_most_s=0.0):
                handle = prepared.message.handle
                self._announcing.add(handle)
                if prepared.constraint is not None:
                    await self._announce(prepared.message)
                if handle in self._announcing:  # else it has been withdrawn meanwhile
                    self._announcing.discard(handle)
                    self._add(prepared.message, prepared)
            self._pump()
            await asyncio.sleep(GRAMMAR_POLL_S)
        self._is_waiting_for_grammars = False

    async def _announce(self, message: AddRequest) -> None:
        assert message.grammar is not None
        tenant = message.salt if message.grammar else b""  # one tenant's are not found by another
        name = blake2b(len(tenant).to_bytes(4, "little") + tenant + message.grammar).digest()
        if name not in self._announced:
            self._announced[name] = None
            if len(self._announced) > MAX_KEPT:
                self._announced.popitem(last=False)
            await self._engine.announce(message)

    def _withdraw(self, handle: int) -> bool:
        """Ends a request that the parent wants no more; whether it was there."""
        live = self._live.get(handle)
        if live is None:
            if handle in self._announcing:
                self._announcing.discard(handle)
                return True
            return self._grammars.withdraw(handle)
        self._end(live)
        return True

    # ------------------------------------------------------------------------------------------------ what runs

    def _pump(self) -> None:
        """Hands over what there is room for."""
        while (move := self._gate.next()) is not None:
            live = self._live[move.request.handle]
            if move.back:
                self._cancel(live)
            else:
                live.task = self._start(self._run(live))
        self._suspects.write(list(self._gate.running))

    async def _run(self, live: _Live) -> None:
        request = live.request
        try:
            async with contextlib.aclosing(self._engine.generate(request, live.message)) as pieces:
                async for piece in pieces:
                    if self._commit(live, piece):
                        return
        except RequestFailed as error:
            print(f"the request with handle {request.handle}: {error}", file=sys.stderr)
        live.task = None
        self._tell_end(request.handle, FinishReason.FAILED)
        self._end(live)
        self._pump()

    def _commit(self, live: _Live, piece: Piece) -> bool:
        """Puts what the engine has brought into the request; whether it has ended with it."""
        request = live.request
        if not request.started:
            request.started = True
            cached_tokens = min(piece.cached_tokens, request.num_prompt_tokens)
            self._num_prompt_tokens += request.num_prompt_tokens
            self._num_cached_tokens += cached_tokens
            self._report.started.append(Started(request.handle, cached_tokens))
        ids, reason = _own_ids(request, piece.ids)
        if request.constraint is not None and ids:
            taken = request.constraint.advance(ids)
            ids, reason = taken.ids, _END_OF_CUT[taken.cut] if taken.over else reason
        if ids:
            was_on_probation, request.probation = request.probation, False
            request.token_ids += ids
            self._num_output_tokens += len(ids)
            self._gate.charge(request, len(ids))
            self._report.tokens.append(Tokens(request.handle, list(ids)))
            if was_on_probation and reason is None:
                self._pump()  # the next may go
        if reason is None and piece.cut:
            reason = FinishReason.MAX_TOKENS
        self._flush_soon()
        if reason is None:
            return False
        live.task = None  # it ends by itself: returning from here frees what it holds
        self._tell_end(request.handle, reason)
        self._end(live)
        self._pump()
        return True

    def _end(self, live: _Live) -> None:
        del self._live[live.request.handle]
        self._gate.remove(live.request)
        self._cancel(live)
        self._flush_soon()

    def _cancel(self, live: _Live) -> None:
        task, live.task = live.task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._die(error)

    # ------------------------------------------------------------------------------------------------ what is told

    def _tell_end(self, handle: int, reason: FinishReason) -> None:
        self._report.finished.append(Finished(handle, reason))
        self._flush_soon()

    def _flush_soon(self) -> None:
        """All of one turn of the loop goes out as one message, after every request that has something has said it."""
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        report, self._report = self._report, StepReport([], [], [])
        now, stats = time.monotonic(), None
        if now - self._stats_at >= STATS_PERIOD_S or not self._live:
            stats = self.stats()
            self._stats_at = now
        if report.started or report.tokens or report.finished or stats is not None:
            self._send(StepReport(report.started, report.tokens, report.finished, stats))


def _own_ids(request: Request, ids: Sequence[int]) -> tuple[list[int], FinishReason | None]:
    """The ids that belong to the output, and why it ends with them if it does."""
    left = request.max_tokens - request.num_output_tokens
    own = list(ids[:left])
    for index, id_ in enumerate(own):
        if id_ in request.stop_ids:
            return own[: index + 1], FinishReason.END_TURN
    return own, FinishReason.MAX_TOKENS if len(own) == left else None
