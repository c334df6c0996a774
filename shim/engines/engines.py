"""All engines of this process: which one takes a request, and how a request goes on when its engine is lost.

Owns the sessions, one an address; addresses come and go (`discovery.py`). Of the connected engines that have a model
ready and are fit (`outliers.py`), the router (`routing.py`) chooses; a request that was not accepted goes to the next.
When a session ends, its requests are submitted again, with what they have produced, as soon as an engine with the same
model revision is there: the consumer of a `Generation` notices nothing but a pause.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import StrEnum

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines.access import MAX_MESSAGE_BYTES, Endpoint, EngineAccess, split_targets
from aiexport_edge.shim.engines.adapters import WantedAdapter
from aiexport_edge.shim.engines.discovery import Discovery, Lookup
from aiexport_edge.shim.engines.generation import ClientGone, Generation, Refused, SessionLost
from aiexport_edge.shim.engines.prefixes import Trail, trail
from aiexport_edge.shim.engines.refusals import RETRY_AFTER_S, can_pass, is_broken
from aiexport_edge.shim.engines.routing import Candidate, Policy, Reason, Router
from aiexport_edge.shim.engines.session import Session
from aiexport_edge.shim.errors import ApiError, Overloaded, RequestTooLarge

ANSWER_TIMEOUT_S = 60.0  # a prompt of 200 K tokens is encoded before it is accepted
IMAGES_TIMEOUT_S = 120.0  # pictures are decoded before a request is sent, one after the other
CONNECT_S = 5.0  # how long a request waits for a connection that is just being made, where no other engine can serve
RESUME_S = 60.0  # how long a reply may pause while no engine can go on with it
RESUME_RETRY_S = 0.25
RESOLVE_S = 10.0
MAX_LOST = 2  # engines that may be lost, or fail, while a request waits for their answer: it could be what kills them
SLOW_ANSWER_S = 5.0  # for a prompt of …
SLOW_ANSWER_BYTES = 64 << 10  # … at most so many bytes; larger ones take their time
MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - (512 << 10)  # the output ids of a long reply come on top when it goes on

NO_TRAIL = Trail((), (), 0, 0)

log = logging.getLogger(__name__)


class ModelState(StrEnum):
    """What can be said of a model over all engines; the best of them counts."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"  # no engine that knows it is connected


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engines say of a model's size, also of one that just now nobody serves."""

    context_window: int
    max_output_tokens: int
    vision: bool


class Engines:
    """Owns one session an address. `targets` are addresses and dns:/// names. `run` for as long as it is used."""

    def __init__(
        self,
        targets: Sequence[str],
        *,
        client: str,
        access: EngineAccess | None = None,
        policy: Policy = Policy.PREFIX,
        resume_s: float = RESUME_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        resolve_s: float = RESOLVE_S,
        lookup: Lookup | None = None,
    ) -> None:
        self._client = client
        self._access = access or EngineAccess()
        self._resume_s = resume_s
        self._answer_timeout_s = answer_timeout_s
        self._changed = asyncio.Event()
        self._resuming: dict[Generation, asyncio.Task[None]] = {}
        self._router = Router(policy)
        self._group: asyncio.TaskGroup | None = None  # while it runs
        self._tasks: dict[Session, asyncio.Task[None]] = {}
        self._fixed, names = split_targets(tuple(targets))
        self._discovery = Discovery(names, every_s=resolve_s, lookup=lookup)
        self.num_resumed = 0
        self.num_retried = 0  # times that a request was asked of a further engine
        self.routed: Counter[Reason] = Counter()
        self._adapters: Sequence[WantedAdapter] = ()
        self.sessions: list[Session] = []
        for endpoint in self._fixed:
            self._add(endpoint)

    async def run(self) -> None:
        """Keeps every session connected until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for session in self.sessions:
                    self._tasks[session] = group.create_task(session.run())
                if self._discovery.names:
                    group.create_task(self._discovery.run(self._found))
        finally:
            self._group = None
            for task in self._resuming.values():
                task.cancel()

    # ------------------------------------------------------------------------------------------ which there are

    def want_adapters(self, adapters: Sequence[WantedAdapter]) -> None:
        """Every engine with their models is to have these adapters, and no others."""
        self._adapters = adapters
        for session in self.sessions:
            session.adapters.want(adapters)

    async def adapter_paths(self) -> set[str] | None:
        """The directories of all adapters that any engine has or still runs with; None while one can't be asked."""
        of_engines = await asyncio.gather(*(session.adapters.paths() for session in self.sessions))
        known = [paths for paths in of_engines if paths is not None]
        return set().union(*known) if len(known) == len(of_engines) else None

    def _found(self, endpoints: Sequence[Endpoint]) -> None:
        """The names stand for these addresses now. One that is gone gets nothing new and ends what it has."""
        wanted = {endpoint.address: endpoint for endpoint in (*self._fixed, *endpoints)}
        for session in list(self.sessions):
            session.leaving = wanted.pop(session.address, None) is None
            if session.leaving and not session.live:
                self._remove(session)
        for endpoint in wanted.values():
            self._add(endpoint)
        self._pulse()

    def _add(self, endpoint: Endpoint) -> None:
        session = Session(endpoint, client=self._client, access=self._access, on_lost=self._lost, on_change=self._pulse)
        session.adapters.want(self._adapters)
        self.sessions.append(session)
        self._compare()
        if self._group is not None:
            self._tasks[session] = self._group.create_task(session.run())

    def _remove(self, session: Session) -> None:
        log.info("engine %s: no longer one of ours", session.address)
        self.sessions.remove(session)
        self._compare()
        task = self._tasks.pop(session, None)
        if task is not None:
            task.cancel()

    def _compare(self) -> None:
        for session in self.sessions:
            session.vitals.watches_load = len(self.sessions) > 1

    # ------------------------------------------------------------------------------------------ what there is

    def state(self, model: str) -> ModelState:
        """The best state of `model` on any engine that would take a request."""
        able = [
            session
            for session in self.sessions
            if session.connected and not session.draining and not session.leaving and model in session.vitals.models
        ]
        if any(session.can_serve(model) for session in able):
            return ModelState.READY
        states = {session.vitals.models[model].state for session in able}
        if states & {pb.MODEL_LOADING, pb.MODEL_READY}:  # ready, but its engine does not serve yet
            return ModelState.LOADING
        return ModelState.FAILED if pb.MODEL_FAILED in states else ModelState.UNAVAILABLE

    def facts(self, model: str) -> ModelFacts | None:
        """The model's sizes; None until an engine has told them. Connected engines' word counts first."""
        for session in sorted(self.sessions, key=lambda session: not session.connected):
            info = session.vitals.models.get(model)
            if info is not None and info.context_window:
                return ModelFacts(info.context_window, info.max_output_tokens, info.vision)
        return None

    # ------------------------------------------------------------------------------------------ requests

    async def admit(self, generation: Generation) -> pb.Accepted:
        """Places a request; returns the engine's word that it is in the queue.

        Raises `ApiError` for a refusal, or what `Generation.fail` was called with. Where nothing can serve it that is
        at once; but a connection that has only just broken, or is yet to be made, is waited for.
        """
        if generation.request.ByteSize() > MAX_REQUEST_BYTES:
            raise RequestTooLarge("The prompt is too large to be sent to a model.")
        refusal: ApiError | None = None
        tried: set[Session] = set()
        lost = 0
        found = self._trail(generation)
        while lost < MAX_LOST and (session := await self._pick_soon(generation, found, tried)) is not None:
            self.num_retried += bool(tried)
            tried.add(session)
            try:
                accepted = await self._submit(session, generation)
            except Refused as refused:
                refusal = refused.error()
                if is_broken(refused.detail):
                    lost += 1
                elif not can_pass(refused.detail):
                    break
            except SessionLost:
                if not session.connected:  # else an upload has heard of it first: nothing more is begun on this channel
                    tried.discard(session)  # it is another engine by then, or only the connection that broke
                lost += 1
            except TimeoutError:
                self.abort(generation)
                lost += 1
                refusal = Overloaded("The model does not answer just now.", retry_after=RETRY_AFTER_S)
            else:
                self._router.placed(found, session.vitals.memory)
                return accepted
        raise refusal or self._unavailable(generation.request)

    def abort(self, generation: Generation) -> None:
        """Takes a request off its engine, wherever it stands. Returns at once."""
        task = self._resuming.pop(generation, None)
        if task is not None:
            task.cancel()
        if generation.session is not None:
            generation.session.abort(generation.tag)
            generation.session = None

    def end_all(self, error: ApiError) -> None:
        """Ends every request with `error`: this process can wait for them no longer."""
        for generation in [*self._resuming, *(g for session in self.sessions for g in session.live)]:
            generation.fail(error)

    # ------------------------------------------------------------------------------------------ placing

    def _trail(self, generation: Generation) -> Trail:
        """The beginnings of its prompt, where there is a choice that they matter to."""
        if len(self.sessions) == 1:
            return NO_TRAIL
        return trail(generation.request, [image.data for image in generation.images])

    def _pick(
        self, generation: Generation, found: Trail, without: Iterable[Session] = (), revision: str | None = None
    ) -> Session | None:
        """One of those that can serve it; of those, one that is fit if there is any, and has room as far as we know."""
        model, adapter = generation.request.model, generation.request.adapter
        able = [
            session
            for session in self.sessions
            if session not in without
            and session.can_serve(model, adapter)
            and (revision is None or session.vitals.models[model].revision == revision)
        ]
        if len(able) > 1:
            able = [session for session in able if session.outlier.admits] or able
            able = [session for session in able if not session.outlier.is_full] or able
        elif not able:
            return None
        for_batch = generation.request.priority == pb.PRIORITY_BATCH
        choice = self._router.choose(
            found,
            [Candidate(session.address, session.vitals.memory, session.load(for_batch=for_batch)) for session in able],
        )
        self.routed[choice.reason] += 1
        return able[choice.index]

    async def _pick_soon(self, generation: Generation, found: Trail, without: Collection[Session]) -> Session | None:
        """`_pick`, as soon as it finds one, while a connection is awaited; for at most `CONNECT_S`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                while True:
                    self._changed.clear()
                    session = self._pick(generation, found, without)
                    awaited = any(each.awaited for each in self.sessions if not (each.leaving or each in without))
                    if session is not None or not awaited:
                        return session
                    await generation.during(self._changed.wait())
        return None

    async def _submit(self, session: Session, generation: Generation) -> pb.Accepted:
        """Places it, its pictures first, and waits for the engine's answer.

        Raises `Refused`, `SessionLost`, `TimeoutError`, or what the generation has failed with meanwhile.
        """
        if not generation.images:
            return await self._ask(session, generation)
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(IMAGES_TIMEOUT_S):
                await generation.during(stack.enter_async_context(session.with_images(generation)))
            if not session.connected:
                raise SessionLost
            return await self._ask(session, generation)

    async def _ask(self, session: Session, generation: Generation) -> pb.Accepted:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[pb.Accepted] = loop.create_future()
        generation.answer = answer
        outlier, began = session.outlier, loop.time()
        on_trial = outlier.sent()
        settle = outlier.withdrawn
        session.submit(generation)
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                accepted = await answer
            slow = loop.time() - began > SLOW_ANSWER_S and generation.request.ByteSize() < SLOW_ANSWER_BYTES
            settle = outlier.failed if slow else outlier.answered
            return accepted
        except Refused as refused:
            settle = outlier.failed if is_broken(refused.detail) else outlier.answered
            if refused.detail.code == pb.ERROR_QUEUE_FULL:
                outlier.full(refused.detail.retry_after_ms / 1000)
            raise
        except TimeoutError:
            settle = outlier.failed
            raise
        finally:
            settle(on_trial=on_trial)
            generation.answer = None

    def _unavailable(self, request: pb.GenerateRequest) -> Overloaded:
        match self.state(request.model):
            case ModelState.READY if request.adapter:
                message = "The fine-tuned model is not loaded just now; the operator finds the reason in the log."
            case ModelState.LOADING:
                message = "The model is still loading."
            case ModelState.FAILED:
                message = "The model could not be loaded; the operator finds the reason in the engine's log."
            case _:
                message = "No engine can serve this model just now."
        return Overloaded(message, retry_after=RETRY_AFTER_S)

    # ------------------------------------------------------------------------------------------ going on

    def _lost(self, generation: Generation) -> None:
        if generation.on_lost():
            task = asyncio.create_task(self._resume(generation))
            self._resuming[generation] = task
            task.add_done_callback(lambda _: self._resuming.pop(generation, None))

    async def _resume(self, generation: Generation) -> None:
        """Submits again until an engine takes it, for at most `resume_s`."""
        request_id = generation.request.request_id
        found = self._trail(generation)
        lost = 0
        try:
            async with asyncio.timeout(self._resume_s):
                while not generation.ended:
                    session = await self._session_for(generation, found)
                    try:
                        await self._submit(session, generation)
                    except (SessionLost, ClientGone, ApiError):  # of the last two it has ended
                        continue
                    except TimeoutError:
                        session.abort(generation.tag)
                    except Refused as refused:
                        lost += is_broken(refused.detail)
                        if lost == MAX_LOST or not (can_pass(refused.detail) or is_broken(refused.detail)):
                            generation.fail(refused.error())
                            return
                        await asyncio.sleep(RESUME_RETRY_S)
                    else:
                        self._router.placed(found, session.vitals.memory)
                        self.num_resumed += 1
                        log.info("%s goes on at engine %s", request_id, session.address)
                        return
        except TimeoutError:
            log.warning("%s could not go on within %.0f s", request_id, self._resume_s)
            if generation.session is not None:
                generation.session.abort(generation.tag)
            generation.fail(
                Overloaded("The model's engine was lost and did not come back in time.", retry_after=RETRY_AFTER_S)
            )

    async def _session_for(self, generation: Generation, found: Trail) -> Session:
        """Waits for an engine with the model of this request, of the same revision if there is any."""
        assert generation.accepted is not None
        model, revision = generation.request.model, generation.accepted.model_revision
        while True:
            self._changed.clear()
            session = self._pick(generation, found, revision=revision)
            if session is None and all(each.can_serve(model) for each in self.sessions if not each.leaving):
                session = self._pick(generation, found)  # every engine is back, with another model: it refuses
            if session is not None:
                return session
            await self._changed.wait()

    def _pulse(self) -> None:
        self._changed.set()
