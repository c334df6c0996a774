"""One engine address: a gRPC channel and one bidirectional stream on it that carries every request of this process.

Owns the connection and the tags. Reconnects for ever, with backoff; when a session ends it hands its requests back to
its owner, who decides where they go on. Knows nothing of HTTP, and nothing of other engines; what this one says of
itself is in its `vitals`.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from enum import Enum
from functools import partial
from itertools import islice
from typing import Any

import grpc
import grpc.aio

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub
from aiexport_edge.shim.engines.access import AccessError, Endpoint, EngineAccess
from aiexport_edge.shim.engines.adapters import AdapterKeeper
from aiexport_edge.shim.engines.generation import Generation, SessionLost
from aiexport_edge.shim.engines.handshake import why_refused
from aiexport_edge.shim.engines.outliers import Fitness, Outlier
from aiexport_edge.shim.engines.upload import uploaded
from aiexport_edge.shim.engines.vitals import Vitals

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 0.5  # an engine that restarts is found again soon …
AWAY_S = 60.0  # … one that has been away for so long is asked less often
AWAY_RETRY_S = 5.0
STATS_TIMEOUT_S = 3.0  # a person waits for it
BATCH_LOAD = 0.25  # of a batch request, to an interactive one, which goes before it

log = logging.getLogger(__name__)


class EngineState(Enum):
    """What an operator is shown of an engine, and the reason why it gets no work; the first that applies."""

    AWAY = "away"  # not connected
    LEAVING = "leaving"  # its name no longer has this address
    DRAINING = "draining"
    UNHEALTHY = "unhealthy"  # it says that it serves nothing, or still loads
    EJECTED = "ejected"
    TRIAL = "trial"  # after an ejection: one request at a time
    SERVING = "serving"


class Session:
    """The connection to one engine. `run` for as long as it is used; the rest is for `Engines` alone."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        client: str,
        access: EngineAccess,
        on_lost: Callable[[Generation], None],
        on_change: Callable[[], None],
    ) -> None:
        self.endpoint = endpoint
        self.address = endpoint.address
        self.connected = False
        self.awaited = True  # the first attempt to connect, or to connect again, has not failed yet
        self.draining = False
        self.leaving = False  # it gets nothing new, for good
        self.outlier = Outlier()
        self.num_accepted = 0
        self.prompt_tokens = 0  # of requests that started here, and those of them that it had cached
        self.cached_tokens = 0
        self.adapters = AdapterKeeper(self.address, on_change)
        self._client = client
        self._access = access
        self._on_lost = on_lost
        self._on_change = on_change
        self._live: dict[int, Generation] = {}
        self.vitals = Vitals(self.address, num_mine=self._live.__len__, on_change=on_change)
        self._num_batch = 0  # of those
        self._next_tag = 1
        self._outgoing: deque[pb.ClientEvent] = deque()
        self._wake_writer = asyncio.Event()
        self._ask_stats: Callable[..., Awaitable[pb.StatsResponse]] | None = None  # while connected
        self._upload: Callable[[Generation], AbstractAsyncContextManager[None]] | None = None  # likewise

    # ------------------------------------------------------------------------------------------ requests

    @property
    def live(self) -> Collection[Generation]:
        """The generations that are placed here."""
        return self._live.values()

    def can_serve(self, model: str, adapter: str = "") -> bool:
        """Whether a request for `model`, with `adapter` where it is not "", would be taken now."""
        if adapter and adapter not in self.adapters.loaded:
            return False
        if not (self.connected and self.vitals.serving) or self.draining or self.leaving:
            return False
        info = self.vitals.models.get(model)
        return info is not None and info.state == pb.MODEL_READY

    def load(self, *, for_batch: bool) -> float:
        """How many requests one more would share the engine with, weighed by how much they would be in its way."""
        if for_batch:
            return len(self._live) + self.vitals.others
        return len(self._live) - (1 - BATCH_LOAD) * self._num_batch + self.vitals.others

    @property
    def state(self) -> EngineState:
        if not self.connected:
            return EngineState.AWAY
        if self.leaving:
            return EngineState.LEAVING
        if self.draining:
            return EngineState.DRAINING
        if not self.vitals.serving:
            return EngineState.UNHEALTHY
        match self.outlier.fitness:
            case Fitness.EJECTED:
                return EngineState.EJECTED
            case Fitness.TRIAL:
                return EngineState.TRIAL
        return EngineState.SERVING

    def submit(self, generation: Generation) -> None:
        """Places a generation here. Its `answer` gets the engine's."""
        assert self.connected
        tag = self._next_tag
        self._next_tag += 1
        generation.session, generation.tag = self, tag
        self._live[tag] = generation
        self._num_batch += generation.request.priority == pb.PRIORITY_BATCH
        self._send(pb.ClientEvent(submit=pb.Submit(tag=tag, request=generation.submission())))

    def abort(self, tag: int) -> None:
        """Takes a generation off the engine. Does nothing where it has ended."""
        if self._take_off(tag) is None:
            return
        for index, event in enumerate(self._outgoing):
            if event.WhichOneof("event") == "submit" and event.submit.tag == tag:
                del self._outgoing[index]  # the engine never hears of it
                return
        self._outgoing.appendleft(pb.ClientEvent(abort=pb.Abort(tag=tag)))
        self._wake_writer.set()

    def _take_off(self, tag: int) -> Generation | None:
        generation = self._live.pop(tag, None)
        if generation is not None:
            self._num_batch -= generation.request.priority == pb.PRIORITY_BATCH
        return generation

    def _send(self, event: pb.ClientEvent) -> None:
        self._outgoing.append(event)
        self._wake_writer.set()

    def with_images(self, generation: Generation) -> AbstractAsyncContextManager[None]:
        """Around a submission: the engine has the generation's pictures. Raises `Refused` and `SessionLost`."""
        if self._upload is None:
            raise SessionLost
        return self._upload(generation)

    async def stats(self) -> pb.StatsResponse | None:
        """How loaded the engine says it is; None while it is not connected or does not answer."""
        if self._ask_stats is None:
            return None
        try:
            return await self._ask_stats(pb.StatsRequest(), timeout=STATS_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return None  # the session has ended, and its channel with it

    # ------------------------------------------------------------------------------------------ the connection

    async def run(self) -> None:
        """Connects, serves, and connects again, until cancelled."""
        loop = asyncio.get_running_loop()
        retry_s = FIRST_RETRY_S
        told = False
        since = loop.time()  # it was last connected
        while True:
            try:
                await self._serve_once()
            except grpc.aio.AioRpcError as error:
                if self.connected or not told:
                    log.warning("engine %s: %s", self.address, await self._reason(error))
            except AccessError as error:
                if not told:
                    log.error("engine %s: %s", self.address, error)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                # else: `_watch` has cancelled the call, not this task
            finally:
                was_connected = self.connected
                self._end()
            if was_connected:
                since, retry_s = loop.time(), FIRST_RETRY_S
            last_s = LAST_RETRY_S if loop.time() - since < AWAY_S else AWAY_RETRY_S
            retry_s = min(retry_s * 2, last_s)
            told = not was_connected
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))

    async def _serve_once(self) -> None:
        async with self._access.channel(self.endpoint) as channel:
            stub = EngineStub(channel)
            metadata = self._access.metadata()
            await self.vitals.ask(channel, metadata)
            call = stub.Session(metadata=metadata)
            self._outgoing.clear()
            self._send(pb.ClientEvent(hello=pb.Hello(client=self._client)))
            self.connected = True
            self._ask_stats = partial(stub.Stats, metadata=metadata)
            self._upload = partial(uploaded, stub, metadata)
            log.info("engine %s: connected", self.address)
            self._on_change()
            side_tasks = [
                asyncio.create_task(self._write(call)),
                asyncio.create_task(self._watch(channel, metadata, call)),
                asyncio.create_task(self.adapters.keep(stub, metadata, self.vitals.models)),
            ]
            try:
                while (outputs := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                    self._dispatch(outputs)
            finally:
                call.cancel()
                for task in side_tasks:
                    task.cancel()
                await asyncio.gather(*side_tasks, return_exceptions=True)

    async def _reason(self, error: grpc.aio.AioRpcError) -> str:
        """What is wrong, in words: of a TLS connection that can't be made, gRPC does not say it."""
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            return "it does not take our token; set [shim] engine_token_file to its [engine] token_file"
        if error.code() is grpc.StatusCode.UNAVAILABLE and not self.connected:
            reason = await asyncio.to_thread(why_refused, self.endpoint, self._access)
            if reason is not None:
                return reason
        return f"{error.details()} ({error.code().name})"

    async def _watch(self, channel: grpc.aio.Channel, metadata: Any, call: Any) -> None:
        """Ends the session of an engine that does not answer what it is asked of itself."""
        await self.vitals.keep_asking(channel, metadata)
        call.cancel()

    async def _write(self, call: Any) -> None:
        while True:
            while self._outgoing:
                await call.write(self._outgoing.popleft())
            self._wake_writer.clear()
            await self._wake_writer.wait()

    def _dispatch(self, outputs: pb.StepOutputs) -> None:
        if outputs.draining and not self.draining:
            self.draining = True
            log.info("engine %s: draining", self.address)
            self._on_change()
        live = self._live  # a tag that is not in it was aborted here, and the engine did not know yet
        for output in outputs.outputs:
            generation = live.get(output.tag)
            if generation is None:
                continue
            match output.WhichOneof("event"):
                case "accepted":
                    self.num_accepted += 1
                    generation.on_accepted(output.accepted)
                case "started":
                    self._count(generation, output.started)
                    generation.on_started(output.started)
                case "refused":
                    self._take_off(output.tag)
                    generation.on_refused(output.refused)
        deltas = outputs.deltas
        for tag, text, ids, output_tokens, emitted_bytes in zip(
            deltas.tags, deltas.texts, _ids_by_row(deltas), deltas.output_tokens, deltas.emitted_bytes, strict=True
        ):
            generation = live.get(tag)
            if generation is not None:
                generation.on_delta(text, ids, output_tokens, emitted_bytes)
        for output in outputs.ends:
            generation = self._take_off(output.tag)
            if generation is None:
                continue
            match output.WhichOneof("event"):
                case "finished":
                    generation.on_finished(output.finished)
                case "failed":
                    generation.on_failed(output.failed)

    def _count(self, generation: Generation, started: pb.Started) -> None:
        if generation.accepted is not None:
            self.prompt_tokens += generation.accepted.prompt_tokens
            self.cached_tokens += started.cached_tokens

    def _end(self) -> None:
        """The session is over: every request of it goes back to the owner."""
        was_connected, was_draining = self.connected, self.draining
        was_awaited, self.awaited = self.awaited, was_connected and not was_draining
        self.connected = self.draining = False
        self._ask_stats = self._upload = None
        self.adapters.forget()
        self._outgoing.clear()
        lost = list(self._live.values())
        self._live.clear()
        self._num_batch = self.vitals.others = 0
        if lost and not was_draining:
            self.outlier.lost()
        for generation in lost:
            generation.session = None
        if was_connected:
            log.warning("engine %s: disconnected, %d requests to go on elsewhere", self.address, len(lost))
        if was_connected or was_awaited:
            self._on_change()
        for generation in lost:
            self._on_lost(generation)


def _ids_by_row(deltas: pb.Deltas) -> Iterable[Sequence[int]]:
    if not deltas.num_token_ids:
        return zip(deltas.token_ids)
    ids = iter(deltas.token_ids)
    return [list(islice(ids, number)) for number in deltas.num_token_ids]
