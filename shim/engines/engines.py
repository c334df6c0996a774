"""All engines of this process: which one takes a request, and how a request goes on when its engine is lost.

Owns the sessions. A request goes to the connected engine that has its model ready and the fewest of our requests. When
a session ends, its requests are submitted again, with what they have produced, as soon as an engine with the same model
revision is there: the consumer of a `Generation` notices nothing but a pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines.generation import Generation, Refused, SessionLost
from aiexport_edge.shim.engines.refusals import RETRY_AFTER_S, api_error, can_pass
from aiexport_edge.shim.engines.session import MAX_MESSAGE_BYTES, EngineAccess, Session
from aiexport_edge.shim.errors import ApiError, Overloaded, RequestTooLarge

ANSWER_TIMEOUT_S = 60.0  # a prompt of 200 K tokens is encoded before it is accepted
RESUME_S = 60.0  # how long a reply may pause while no engine can go on with it
RESUME_RETRY_S = 0.25
MAX_LOST = 2  # engines that may be lost while a request waits for their answer: it could be what kills them
MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - (512 << 10)  # the output ids of a long reply come on top when it goes on

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
    """Owns one session an address. `run` for as long as it is used."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        client: str,
        access: EngineAccess | None = None,
        resume_s: float = RESUME_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        self._resume_s = resume_s
        self._answer_timeout_s = answer_timeout_s
        self._changed = asyncio.Event()
        self._resuming: dict[Generation, asyncio.Task[None]] = {}
        self.num_resumed = 0
        self.sessions = [
            Session(
                address,
                client=client,
                access=access or EngineAccess(),
                on_lost=self._lost,
                on_change=self._pulse,
            )
            for address in addresses
        ]

    async def run(self) -> None:
        """Keeps every session connected until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for session in self.sessions:
                    group.create_task(session.run())
        finally:
            for task in self._resuming.values():
                task.cancel()

    # ------------------------------------------------------------------------------------------ what there is

    def state(self, model: str) -> ModelState:
        """The best state of `model` on any engine that would take a request."""
        infos = [s.models[model] for s in self.sessions if s.connected and not s.draining and model in s.models]
        states = {info.state for info in infos}
        if pb.MODEL_READY in states:
            return ModelState.READY
        if pb.MODEL_LOADING in states:
            return ModelState.LOADING
        return ModelState.FAILED if pb.MODEL_FAILED in states else ModelState.UNAVAILABLE

    def facts(self, model: str) -> ModelFacts | None:
        """The model's sizes; None until an engine has told them. Connected engines' word counts first."""
        for session in sorted(self.sessions, key=lambda session: not session.connected):
            info = session.models.get(model)
            if info is not None and info.context_window:
                return ModelFacts(info.context_window, info.max_output_tokens, info.vision)
        return None

    # ------------------------------------------------------------------------------------------ requests

    async def admit(self, generation: Generation) -> pb.Accepted:
        """Places a request; returns the engine's word that it is in the queue.

        Raises `ApiError` for a refusal, at once where nothing can serve it, or what `Generation.fail` was called with.
        """
        if generation.request.ByteSize() > MAX_REQUEST_BYTES:
            raise RequestTooLarge("The prompt is too large to be sent to a model.")
        refusal: ApiError | None = None
        tried: set[Session] = set()
        lost = 0
        while (session := self._pick(generation.request.model, tried)) is not None:
            tried.add(session)
            try:
                return await self._submit(session, generation)
            except Refused as refused:
                refusal = api_error(refused.detail)
                if not can_pass(refused.detail):
                    break
            except SessionLost:
                lost += 1
                if lost == MAX_LOST:
                    break
            except TimeoutError:
                self.abort(generation)
                raise Overloaded("The model does not answer just now.", retry_after=RETRY_AFTER_S) from None
        raise refusal or self._unavailable(generation.request.model)

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

    def _pick(self, model: str, without: Iterable[Session] = (), revision: str | None = None) -> Session | None:
        able = [
            session
            for session in self.sessions
            if session not in without
            and session.can_serve(model)
            and (revision is None or session.models[model].revision == revision)
        ]
        return min(able, key=lambda session: len(session.live), default=None)

    async def _submit(self, session: Session, generation: Generation) -> pb.Accepted:
        answer: asyncio.Future[pb.Accepted] = asyncio.get_running_loop().create_future()
        generation.answer = answer
        session.submit(generation)
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                return await answer
        finally:
            generation.answer = None

    def _unavailable(self, model: str) -> Overloaded:
        match self.state(model):
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
        try:
            async with asyncio.timeout(self._resume_s):
                while not generation.ended:
                    session = await self._session_for(generation)
                    try:
                        await self._submit(session, generation)
                    except SessionLost:
                        continue
                    except Refused as refused:
                        if not can_pass(refused.detail):
                            generation.fail(api_error(refused.detail))
                            return
                        await asyncio.sleep(RESUME_RETRY_S)
                    else:
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

    async def _session_for(self, generation: Generation) -> Session:
        """Waits for an engine with the model of this request, of the same revision if there is any."""
        assert generation.accepted is not None
        model, revision = generation.request.model, generation.accepted.model_revision
        while True:
            self._changed.clear()
            session = self._pick(model, revision=revision)
            if session is None and all(session.can_serve(model) for session in self.sessions):
                session = self._pick(model)  # every engine is back, with another model: it refuses, and says why
            if session is not None:
                return session
            await self._changed.wait()

    def _pulse(self) -> None:
        self._changed.set()
