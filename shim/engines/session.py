"""One engine address: a gRPC channel and one bidirectional stream on it that carries every request of this process.

Owns the connection, the tags, and what the engine has said of its models. Reconnects for ever, with backoff; when a
session ends it hands its requests back to its owner, who decides where they go on. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub
from aiexport_edge.proto.units import is_loopback, split_address
from aiexport_edge.shim.engines.generation import Generation

MAX_MESSAGE_BYTES = 33 << 20  # as the engine has it; a larger one would end the session
FIRST_RETRY_S = 0.1
LAST_RETRY_S = 0.5
LOADING_REFRESH_S = 0.1  # while a model is loading
REFRESH_S = 5.0
CALL_TIMEOUT_S = 15.0
STATS_TIMEOUT_S = 3.0  # a person waits for it

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineAccess:
    """What an engine beyond this machine wants: TLS and a token. `ca` (PEM) None: the authorities that gRPC knows."""

    ca: bytes | None = None
    token: str | None = None

    @staticmethod
    def load(ca: Path | None, token_file: Path | None) -> EngineAccess:
        return EngineAccess(
            ca=None if ca is None else ca.read_bytes(),
            token=None if token_file is None else token_file.read_text(encoding="utf-8").strip(),
        )


class Session:
    """The connection to one engine. `run` for as long as it is used; the rest is for `Engines` alone."""

    def __init__(
        self,
        address: str,
        *,
        client: str,
        access: EngineAccess,
        on_lost: Callable[[Generation], None],
        on_change: Callable[[], None],
    ) -> None:
        self.address = address
        self.connected = False
        self.draining = False
        self.models: Mapping[str, pb.ModelInfo] = {}  # as last told, also while disconnected
        self._client = client
        self._access = access
        self._on_lost = on_lost
        self._on_change = on_change
        self._live: dict[int, Generation] = {}
        self._next_tag = 1
        self._outgoing: deque[pb.ClientEvent] = deque()
        self._wake_writer = asyncio.Event()
        self._ask_stats: Callable[..., Awaitable[pb.StatsResponse]] | None = None  # while connected

    # ------------------------------------------------------------------------------------------ requests

    @property
    def live(self) -> Collection[Generation]:
        """The generations that are placed here."""
        return self._live.values()

    def can_serve(self, model: str) -> bool:
        """Whether a request for `model` would be taken now."""
        info = self.models.get(model)
        return self.connected and not self.draining and info is not None and info.state == pb.MODEL_READY

    def submit(self, generation: Generation) -> None:
        """Places a generation here. Its `answer` gets the engine's."""
        assert self.connected
        tag = self._next_tag
        self._next_tag += 1
        generation.session, generation.tag = self, tag
        self._live[tag] = generation
        self._send(pb.ClientEvent(submit=pb.Submit(tag=tag, request=generation.submission())))

    def abort(self, tag: int) -> None:
        """Takes a generation off the engine. Does nothing where it has ended."""
        if self._live.pop(tag, None) is None:
            return
        for index, event in enumerate(self._outgoing):
            if event.WhichOneof("event") == "submit" and event.submit.tag == tag:
                del self._outgoing[index]  # the engine never hears of it
                return
        self._outgoing.appendleft(pb.ClientEvent(abort=pb.Abort(tag=tag)))
        self._wake_writer.set()

    def _send(self, event: pb.ClientEvent) -> None:
        self._outgoing.append(event)
        self._wake_writer.set()

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
        retry_s = FIRST_RETRY_S
        told = False
        while True:
            try:
                await self._serve_once()
            except grpc.aio.AioRpcError as error:
                if self.connected or not told:
                    log.warning("engine %s: %s (%s)", self.address, error.details(), error.code().name)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                # else: `_keep_refreshing` has cancelled the call, not this task
            finally:
                was_connected = self.connected
                self._end()
            retry_s = FIRST_RETRY_S if was_connected else min(retry_s * 2, LAST_RETRY_S)
            told = not was_connected
            await asyncio.sleep(retry_s * random.uniform(0.5, 1.0))

    async def _serve_once(self) -> None:
        async with self._channel() as channel:
            stub = EngineStub(channel)
            metadata = None if self._access.token is None else (("authorization", f"Bearer {self._access.token}"),)
            await self._refresh(stub, metadata)
            call = stub.Session(metadata=metadata)
            self._outgoing.clear()
            self._send(pb.ClientEvent(hello=pb.Hello(client=self._client)))
            self.connected = True
            self._ask_stats = partial(stub.Stats, metadata=metadata)
            log.info("engine %s: connected", self.address)
            self._on_change()
            side_tasks = [
                asyncio.create_task(self._write(call)),
                asyncio.create_task(self._keep_refreshing(stub, metadata, call)),
            ]
            try:
                while (outputs := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                    self._dispatch(outputs)
            finally:
                call.cancel()
                for task in side_tasks:
                    task.cancel()
                await asyncio.gather(*side_tasks, return_exceptions=True)

    def _channel(self) -> grpc.aio.Channel:
        options = [
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.use_local_subchannel_pool", 1),  # else a new channel inherits the backoff of the last one
            ("grpc.enable_http_proxy", 0),
        ]
        if self._access.ca is None and _is_local(self.address):
            return grpc.aio.insecure_channel(self.address, options)
        return grpc.aio.secure_channel(self.address, grpc.ssl_channel_credentials(self._access.ca), options)

    async def _write(self, call: Any) -> None:
        while True:
            while self._outgoing:
                await call.write(self._outgoing.popleft())
            self._wake_writer.clear()
            await self._wake_writer.wait()

    async def _refresh(self, stub: Any, metadata: Any) -> None:
        listed = await stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=CALL_TIMEOUT_S)
        self.models = {model.name: model for model in listed.models}

    async def _keep_refreshing(self, stub: Any, metadata: Any, call: Any) -> None:
        """Asks for the models' states. An engine that does not answer at all is as good as dead: ends the session."""
        while True:
            loading = any(model.state == pb.MODEL_LOADING for model in self.models.values())
            await asyncio.sleep(LOADING_REFRESH_S if loading else REFRESH_S)
            before = self.models
            try:
                await self._refresh(stub, metadata)
            except grpc.aio.AioRpcError as error:
                log.warning("engine %s: does not answer (%s)", self.address, error.code().name)
                call.cancel()
                return
            if self.models != before:
                self._on_change()

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
                    generation.on_accepted(output.accepted)
                case "started":
                    generation.on_started(output.started)
                case "refused":
                    del live[output.tag]
                    generation.on_refused(output.refused)
        deltas = outputs.deltas
        for tag, text, ids, output_tokens, emitted_bytes in zip(
            deltas.tags, deltas.texts, _ids_by_row(deltas), deltas.output_tokens, deltas.emitted_bytes, strict=True
        ):
            generation = live.get(tag)
            if generation is not None:
                generation.on_delta(text, ids, output_tokens, emitted_bytes)
        for output in outputs.ends:
            generation = live.pop(output.tag, None)
            if generation is None:
                continue
            match output.WhichOneof("event"):
                case "finished":
                    generation.on_finished(output.finished)
                case "failed":
                    generation.on_failed(output.failed)

    def _end(self) -> None:
        """The session is over: every request of it goes back to the owner."""
        was_connected, self.connected, self.draining = self.connected, False, False
        self._ask_stats = None
        self._outgoing.clear()
        lost = list(self._live.values())
        self._live.clear()
        for generation in lost:
            generation.session = None
        if was_connected:
            log.warning("engine %s: disconnected, %d requests to go on elsewhere", self.address, len(lost))
            self._on_change()
        for generation in lost:
            self._on_lost(generation)


def _ids_by_row(deltas: pb.Deltas) -> Iterable[Sequence[int]]:
    if not deltas.num_token_ids:
        return zip(deltas.token_ids)
    ids = iter(deltas.token_ids)
    return [list(islice(ids, number)) for number in deltas.num_token_ids]


def _is_local(address: str) -> bool:
    """Whether the engine is on this machine; elsewhere the connection is encrypted or not made."""
    return address.startswith("unix:") or is_loopback(split_address(address)[0])
