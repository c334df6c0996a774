"""One session: every request of one client process over one stream.

Owns the protocol's rules (Hello first, one answer to each Submit, what ends a session) and the session's requests. Two
coroutines whatever the number of requests: one reads events, one writes what the outbox has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc

from aiexport_edge.engine.server.generation import Generation
from aiexport_edge.engine.server.generations import Generations
from aiexport_edge.engine.server.outbox import Outbox, OutboxBound
from aiexport_edge.proto import engine_pb2 as pb

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[pb.ClientEvent, pb.StepOutputs]"


class ProtocolError(Exception):
    """The client has broken a rule of the session, which ends it."""


class Session:
    """From Hello to the end of the stream. A client that closes its side gets what its requests still bring."""

    def __init__(
        self,
        generations: Generations,
        events: AsyncIterator[pb.ClientEvent],
        context: Context,
        bound: OutboxBound,
    ) -> None:
        self._generations = generations
        self._events = events
        self._context = context
        self._outbox = Outbox(self._overflow, bound)
        self._live: dict[int, Generation] = {}
        self._client = ""
        self._half_closed = False
        self._failure: tuple[grpc.StatusCode, str] | None = None

    def drain(self) -> None:
        """Tells the client that the engine drains."""
        self._outbox.drain()

    async def run(self) -> None:
        """Serves the stream to its end. Ends its requests however it ends."""
        reader = asyncio.create_task(self._read(), name="session reader")
        try:
            while (outputs := await self._outbox.take()) is not None:
                await self._context.write(outputs)
            if self._failure is not None:
                await self._context.abort(*self._failure)
        finally:
            reader.cancel()
            self._drop_requests()

    async def _read(self) -> None:
        """Takes the client's events until its side closes."""
        greeted = False
        try:
            async for event in self._events:
                if greeted:
                    self._handle(event)
                elif event.WhichOneof("event") == "hello":
                    self._client = event.hello.client
                    greeted = True
                else:
                    raise ProtocolError("The first event of a session is a Hello.")
        except ProtocolError as error:
            self._fail(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception:
            log.exception("session reader")
            self._fail(grpc.StatusCode.INTERNAL, "The engine could not go on with this session.")
        else:
            self._half_closed = True
            self._close_if_done()

    def _fail(self, code: grpc.StatusCode, sentence: str) -> None:
        """Ends the session: its requests now, the call as soon as a write that is under way allows. That is when the
        client reads again or is gone; gRPC has no other way to end a call from here. Until then one message is kept.
        """
        if self._failure is None:
            log.warning("session ended: %s", sentence, extra={"fields": {"client": self._client}})
            self._failure = (code, sentence)
            self._outbox.discard()
            self._drop_requests()

    def _handle(self, event: pb.ClientEvent) -> None:
        match event.WhichOneof("event"):
            case "submit":
                tag = event.submit.tag
                if tag in self._live:
                    raise ProtocolError(f"The tag {tag} is in use by a request that has not ended.")
                generation = self._generations.submit(event.submit.request, self._outbox, tag, lambda: self._ended(tag))
                if not generation.ended:
                    self._live[tag] = generation
            case "abort":
                generation_ = self._live.get(event.abort.tag)
                if generation_ is not None:
                    generation_.abort()
            case "hello":
                raise ProtocolError("A session has one Hello.")
            case _:
                raise ProtocolError("An event of a session is a Submit or an Abort.")

    def _ended(self, tag: int) -> None:
        self._live.pop(tag, None)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._half_closed and not self._live:
            self._outbox.close()

    def _overflow(self) -> None:
        self._fail(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "The session does not read what the engine sends; connect again and read on.",
        )

    def _drop_requests(self) -> None:
        for generation in list(self._live.values()):
            generation.drop()
        self._live.clear()
