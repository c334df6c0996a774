"""What the same work costs with nothing around it: the floors that the stack's own figures stand beside.

    python -m benchmarks.overhead.floors writes --fd N    a socket server that only writes bytes made beforehand
    python -m benchmarks.overhead.floors events --fd N    an ASGI application on uvicorn that only writes events
    python -m benchmarks.overhead.floors tokens ADDR      a gRPC servicer that only sends messages made beforehand

`writes` and `events` are asked for `/?streams=N&pace_us=P` and write one event to each of N streams every P
microseconds, once all are there. `tokens` sends a message of 256 deltas again and again.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import time
from typing import Any, ClassVar
from urllib.parse import parse_qs

import grpc.aio
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.lifetime import die_with_parent
from aiexport_edge.shim import sse

DELTAS = 256
COUNT_S = 3.0
WORD = " bears"


class Writes(asyncio.Protocol):
    """What an event costs on its way through the event loop and the system, whoever makes it."""

    streams: ClassVar[list[asyncio.Transport]] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        target = data.split(b" ")[1].decode()
        if target == "/readyz":
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return
        query = parse_qs(target.partition("?")[2])
        self.streams.append(self._transport)
        self._transport.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        if len(self.streams) == int(query["streams"][0]):
            event = sse.text_delta(WORD)
            chunk = b"%x\r\n%b\r\n" % (len(event), event)
            self._beating = asyncio.ensure_future(self._beat(int(query["pace_us"][0]) / 1e6, chunk))

    async def _beat(self, pace_s: float, chunk: bytes) -> None:
        due = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += pace_s
            for stream in self.streams:
                stream.write(chunk)


class Events:
    """One event to every stream at each beat."""

    def __init__(self) -> None:
        self._streams: list[asyncio.Future[None]] = []
        self._beating: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        await receive()
        if scope["path"] == "/readyz":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return
        query = parse_qs(scope["query_string"].decode())
        await send({"type": "http.response.start", "status": 200, "headers": list(sse.HEADERS)})
        event = sse.text_delta(WORD)
        loop = asyncio.get_running_loop()
        if self._beating is None:
            num_streams, pace_us = int(query["streams"][0]), int(query["pace_us"][0])
            self._beating = asyncio.create_task(self._beat(num_streams, pace_us / 1e6))
        gone = asyncio.ensure_future(receive())
        while not gone.done():
            beat = loop.create_future()
            self._streams.append(beat)
            await beat
            await send({"type": "http.response.body", "body": event, "more_body": True})

    async def _beat(self, num_streams: int, pace_s: float) -> None:
        due = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += pace_s
            if len(self._streams) >= num_streams:
                streams, self._streams = self._streams, []
                for beat in streams:
                    beat.set_result(None)


def serve_events(fd: int) -> None:
    """Until killed."""
    config = uvicorn.Config(Events(), log_config=None, access_log=False, ws="none", lifespan="off", http="httptools")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(config).serve(sockets=[socket.socket(fileno=fd)]))


def serve_writes(fd: int) -> None:
    """Until killed."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Writes, sock=socket.socket(fileno=fd))
        await server.serve_forever()

    uvloop.run(serve())


async def serve_tokens(address: str) -> None:
    """Sends the same message for ever to whoever calls."""
    deltas = pb.Deltas(
        tags=range(DELTAS),
        texts=[WORD] * DELTAS,
        token_ids=[300] * DELTAS,
        output_tokens=[9] * DELTAS,
        emitted_bytes=[54] * DELTAS,
    )
    message = pb.StepOutputs(deltas=deltas).SerializeToString()

    async def session(events: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while True:
            await context.write(message)

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(session)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor", {"Session": handler}),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


async def count_tokens(address: str) -> tuple[float, float]:
    """Microseconds of processor time a delta that reading costs, and one that reading and parsing does."""
    async with grpc.aio.insecure_channel(address) as channel:
        found = []
        for parse in (None, pb.StepOutputs.FromString):
            session = channel.stream_stream("/floor/Session", request_serializer=None, response_deserializer=parse)
            call: Any = session(iter(()), wait_for_ready=True)
            await call.read()
            start, end, num_messages = time.process_time(), time.monotonic() + COUNT_S / 2, 0
            while time.monotonic() < end:
                await call.read()
                num_messages += 1
            found.append((time.process_time() - start) * 1e6 / (num_messages * DELTAS))
            call.cancel()
    return found[0], found[1]


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("floor", choices=("writes", "events", "tokens"))
    parser.add_argument("address", nargs="?", default="")
    parser.add_argument("--fd", type=int, default=-1)
    arguments = parser.parse_args()
    match arguments.floor:
        case "writes":
            serve_writes(arguments.fd)
        case "events":
            serve_events(arguments.fd)
        case _:
            uvloop.run(serve_tokens(arguments.address))


if __name__ == "__main__":
    main()
