"""The RPCs of `proto/engine.proto`, as its comments say. Owns the set of open sessions; each call's work is done
elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from aiexport_edge.engine.backends.base import ModelState
from aiexport_edge.engine.server import errors
from aiexport_edge.engine.server.adapters import to_proto
from aiexport_edge.engine.server.generations import Generations
from aiexport_edge.engine.server.outbox import Outbox, OutboxBound
from aiexport_edge.engine.server.pictures import UPLOAD_S, UploadEvents, receive_images
from aiexport_edge.engine.server.session import Session
from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineServicer

_STATES = {
    ModelState.LOADING: pb.MODEL_LOADING,
    ModelState.READY: pb.MODEL_READY,
    ModelState.FAILED: pb.MODEL_FAILED,
}


class EngineService(EngineServicer):
    """The gRPC servicer (asyncio)."""

    def __init__(self, generations: Generations, bound: OutboxBound) -> None:
        self._generations = generations
        self._bound = bound
        self._sessions: set[Session] = set()
        self._born = time.monotonic()

    def drain(self) -> None:
        """Takes no new requests from here on, and says so to every session."""
        self._generations.draining = True
        for session in self._sessions:
            session.drain()

    async def Session(
        self, request_iterator: AsyncIterator[pb.ClientEvent], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        session = Session(self._generations, request_iterator, context, self._bound)
        self._sessions.add(session)
        if self._generations.draining:
            session.drain()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """A session of one request: a fold over the same outputs."""
        overflowed = pb.ErrorDetail(code=pb.ERROR_INTERNAL, message="The client does not read what the engine sends.")

        def overflow() -> None:
            outbox.failed(0, overflowed)
            generation.drop()

        outbox = Outbox(overflow, self._bound)
        generation = self._generations.submit(request, outbox, 0, outbox.close)
        try:
            while (outputs := await outbox.take()) is not None:
                for event in _events(outputs):
                    if isinstance(event, pb.ErrorDetail):
                        await errors.abort(context, event)
                    await context.write(event)
        finally:
            generation.drop()

    async def UploadImages(
        self, request_iterator: AsyncIterator[pb.UploadEvent], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        generations, events = self._generations, UploadEvents(request_iterator)
        refusal: errors.RequestError | None = None
        try:
            async with asyncio.timeout(UPLOAD_S):
                try:
                    with contextlib.ExitStack() as stack:
                        uploaded = await receive_images(events, generations.models, generations.pictures, stack)
                        await context.write(uploaded)
                        if await events.next() is not None:  # there for as long as the client does not end the call
                            raise errors.InvalidRequest("Nothing follows the end of an upload.", "event")
                except errors.RequestError as error:
                    refusal = error
                    await events.drain()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"An upload lasts {UPLOAD_S:.0f} s at most.")
        if refusal is not None:
            await errors.abort(context, refusal.detail)

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.CountTokensResponse:
        try:
            return pb.CountTokensResponse(prompt_tokens=await self._generations.count_tokens(request))
        except errors.RequestError as error:
            await errors.abort(context, error.detail)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        response = pb.ListModelsResponse()
        for model in self._generations.models.values():
            facts, status = model.facts, model.status
            response.models.add(
                name=facts.name,
                state=_STATES[status.state],
                revision=facts.revision,
                context_window=model.context_window,
                max_output_tokens=model.max_output_tokens,
                vision=facts.vision is not None,
                deterministic=facts.deterministic,
                message=status.message,
            )
        return response

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.Adapter:
        adapters = self._generations.adapters
        try:
            return to_proto(await adapters.load(request, self._generations.in_thread))
        except errors.RequestError as error:
            await errors.abort(context, error.detail)

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.UnloadAdapterResponse:
        self._generations.adapters.remove(request.name)
        return pb.UnloadAdapterResponse()

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListAdaptersResponse:
        adapters = self._generations.adapters
        return pb.ListAdaptersResponse(
            adapters=map(to_proto, adapters.served()), leaving=map(to_proto, adapters.leaving())
        )

    async def Stats(self, request: pb.StatsRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.StatsResponse:
        stats = self._generations.backend.stats()
        response = pb.StatsResponse(
            core_restarts=stats.core_restarts,
            core_pid=stats.core_pid,
            uptime_s=time.monotonic() - self._born,
            sessions=len(self._sessions),
            draining=self._generations.draining,
        )
        core = stats.core
        for index, name in enumerate(self._generations.models):
            model = response.models.add(name=name)
            if core is not None:
                model.running = core.model_running[index]
                model.waiting = core.model_waiting[index]
                model.prompt_tokens = core.model_prompt_tokens[index]
                model.cached_tokens = core.model_cached_tokens[index]
                model.output_tokens = core.model_output_tokens[index]
                if core.model_guessed_tokens:
                    model.guessed_tokens = core.model_guessed_tokens[index]
                    model.accepted_tokens = core.model_accepted_tokens[index]
        if core is not None:
            response.steps = core.steps
            response.running = core.running
            response.waiting = core.waiting
            response.pages_total = core.pages_total
            response.pages_used = core.pages_used
            response.pages_cached = core.pages_cached
            response.pages_free = core.pages_free
            response.page_bytes = core.page_bytes
            response.preemptions = core.preemptions
        return response


def _events(outputs: pb.StepOutputs) -> Iterator[pb.GenerateEvent | pb.ErrorDetail]:
    """What a message says of the only request that it is about, in order. An error ends the call."""
    for output in outputs.outputs:
        match output.WhichOneof("event"):
            case "accepted":
                yield pb.GenerateEvent(accepted=output.accepted)
            case "started":
                yield pb.GenerateEvent(started=output.started)
            case _:
                yield output.refused
    for text, output_tokens, emitted_bytes in zip(
        outputs.deltas.texts, outputs.deltas.output_tokens, outputs.deltas.emitted_bytes, strict=True
    ):
        ids = outputs.deltas.token_ids
        yield pb.GenerateEvent(
            delta=pb.Delta(text=text, token_ids=ids, output_tokens=output_tokens, emitted_bytes=emitted_bytes)
        )
    for output in outputs.ends:
        match output.WhichOneof("event"):
            case "finished":
                yield pb.GenerateEvent(finished=output.finished)
            case _:
                yield output.failed
