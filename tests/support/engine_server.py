"""A listening engine in this event loop, over a scripted core; and a session client that sorts what it hears."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from support.scripted_core import command, core_config, undisturbed

from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.models.facts import ModelFacts, Vision
from aiexport_edge.engine.server.listener import ListenerConfig
from aiexport_edge.engine.server.outbox import DEFAULT_BOUND, OutboxBound
from aiexport_edge.engine.server.process import ImageConfig, Server, ServerConfig
from aiexport_edge.engine.text.template import ChatTemplate, Message
from aiexport_edge.engine.text.tokenizer import Tokenizer
from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub

CONTEXT_WINDOW = 4096
MAX_OUTPUT_TOKENS = 2048
VOCAB_SIZE = 600  # more than the tokenizer has, as with real models


def run(test: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine; it has an end."""
    asyncio.run(asyncio.wait_for(test, 60))


async def until(condition: Callable[[], bool] | Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Waits for what nobody announces."""
    while True:
        outcome = condition()
        if (await outcome) if asyncio.iscoroutine(outcome) else outcome:
            return
        await asyncio.sleep(0.005)


@dataclass
class Engine:
    """What a test needs of a running engine; `expected` is the ids of an undisturbed reply to a chat."""

    server: Server
    backend: NativeBackend
    address: str
    stub: EngineStub
    channel: grpc.aio.Channel
    tokenizer: Tokenizer
    template: ChatTemplate

    def expected(self, request: pb.GenerateRequest, num_tokens: int) -> list[int]:
        assert len(request.chat.messages) == 1
        prompt = self.template.encode([Message("user", request.chat.messages[0].content[0].text)])
        return undisturbed(prompt, num_tokens)

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.tokenizer.decode_bytes, ids)).decode("utf-8", "replace")

    async def stats(self) -> pb.StatsResponse:
        stats: pb.StatsResponse = await self.stub.Stats(pb.StatsRequest())
        return stats

    async def models(self) -> list[pb.ModelInfo]:
        return list((await self.stub.ListModels(pb.ListModelsRequest())).models)

    async def is_idle(self, *, sessions: int | None = None) -> bool:
        """Whether no request holds anything (and so many sessions are open)."""
        stats = await self.stats()
        return stats.pages_used == stats.running == stats.waiting == 0 and sessions in (None, stats.sessions)

    async def until_ready(self) -> None:
        async def ready() -> bool:
            return all(model.state == pb.MODEL_READY for model in await self.models())

        await until(ready)


@asynccontextmanager
async def engine(
    directory: Path,
    *core_options: object,
    wait: bool = True,
    queue_size: int = 64,
    tenant_queue_share: float = 0.5,
    max_num_running: int = 64,
    drain_s: float = 30.0,
    outbox: OutboxBound = DEFAULT_BOUND,
    served_directory: Path | None = None,
    vision: Vision | None = None,
    images: ImageConfig = ImageConfig(),  # noqa: B008 (frozen)
) -> AsyncIterator[Engine]:
    """Serves one model `m0` with the tokenizer of `directory` (or, to break it, of another) on a free port."""
    facts = ModelFacts(
        "m0",
        served_directory or directory,
        "revision-0",
        VOCAB_SIZE,
        CONTEXT_WINDOW,
        MAX_OUTPUT_TOKENS,
        True,
        (),
        vision,
    )
    backend = NativeBackend(core_config(max_num_running=max_num_running), command=command(*core_options))
    config = ServerConfig(
        listener=ListenerConfig("127.0.0.1:0"),
        models=[facts],
        queue_size=queue_size,
        tenant_queue_share=tenant_queue_share,
        drain_s=drain_s,
        outbox=outbox,
        images=images,
    )
    server = Server(config, backend)
    try:
        await server.start()
        address = f"127.0.0.1:{server.listener.port}"
        tokenizer = Tokenizer.load(directory)
        async with grpc.aio.insecure_channel(address) as channel:
            running = Engine(
                server,
                backend,
                address,
                EngineStub(channel),
                channel,
                tokenizer,
                ChatTemplate.load(directory, tokenizer),
            )
            if wait:
                await running.until_ready()
            yield running
    finally:
        await server.stop()


def chat(text: str, *, max_tokens: int | None = 20, model: str = "m0", **fields: Any) -> pb.GenerateRequest:
    """A request with one user message."""
    message = pb.Message(role=pb.ROLE_USER, content=[pb.ContentBlock(text=text)])
    request = pb.GenerateRequest(request_id="r", model=model, chat=pb.Chat(messages=[message]), **fields)
    if max_tokens is not None:
        request.max_tokens = max_tokens
    return request


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """How a stream ended; what it still says before that is read and dropped."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code(), await call.details()


class Reply:
    """What came under one tag, checked against the session's rules as it comes."""

    def __init__(self) -> None:
        self.accepted: pb.Accepted | None = None
        self.refused: pb.ErrorDetail | None = None
        self.started: pb.Started | None = None
        self.finished: pb.Finished | None = None
        self.failed: pb.ErrorDetail | None = None
        self.text = ""
        self.ids: list[int] = []
        self.num_deltas = 0
        self.output_tokens = 0
        self.emitted_bytes = 0

    @property
    def ended(self) -> bool:
        return bool(self.refused or self.finished or self.failed)

    def hear(self, output: pb.Output | pb.GenerateEvent) -> None:
        assert not self.ended, "nothing comes after the end"
        match output.WhichOneof("event"):
            case "accepted":
                assert self.accepted is None
                self.accepted = output.accepted
            case "refused":
                assert isinstance(output, pb.Output)
                assert self.accepted is None
                self.refused = output.refused
            case "started":
                assert self.accepted is not None
                assert self.started is None
                assert not self.num_deltas
                self.started = output.started
            case "delta":
                assert isinstance(output, pb.GenerateEvent)
                self.hear_delta(output.delta)
            case "finished":
                assert self.accepted is not None
                assert output.finished.output_tokens >= self.output_tokens
                self.finished = output.finished
            case "failed":
                assert isinstance(output, pb.Output)
                assert self.accepted is not None
                self.failed = output.failed
            case other:
                raise AssertionError(other)

    def hear_delta(self, delta: pb.Delta) -> None:
        assert not self.ended, "nothing comes after the end"
        assert self.accepted is not None
        assert delta.output_tokens >= self.output_tokens
        assert delta.emitted_bytes >= self.emitted_bytes
        self.text += delta.text
        self.ids += delta.token_ids
        self.num_deltas += 1
        self.output_tokens, self.emitted_bytes = delta.output_tokens, delta.emitted_bytes


def rows(deltas: pb.Deltas) -> Iterator[tuple[int, pb.Delta]]:
    """The deltas of a message by tag."""
    assert len(set(deltas.tags)) == len(deltas.tags)
    ids = list(deltas.token_ids)
    num_ids = list(deltas.num_token_ids) or [1] * len(deltas.tags)
    assert sum(num_ids) == len(ids)
    counters = zip(deltas.output_tokens, deltas.emitted_bytes, strict=True)
    for tag, text, number, (output_tokens, emitted_bytes) in zip(
        deltas.tags, deltas.texts, num_ids, counters, strict=True
    ):
        mine, ids = ids[:number], ids[number:]
        yield tag, pb.Delta(text=text, token_ids=mine, output_tokens=output_tokens, emitted_bytes=emitted_bytes)


class SessionClient:
    """A session with everything it hears, by tag."""

    def __init__(self, stub: EngineStub) -> None:
        self.call: Any = stub.Session()
        self.replies: dict[int, Reply] = {}
        self.draining = False
        self.num_messages = 0
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def hello(self, *, read: bool = True) -> SessionClient:
        await self.call.write(pb.ClientEvent(hello=pb.Hello(client="test")))
        if read:
            self._reader = asyncio.create_task(self._read())
        return self

    async def submit(self, tag: int, request: pb.GenerateRequest) -> Reply:
        reply = self.replies[tag] = Reply()
        await self.call.write(pb.ClientEvent(submit=pb.Submit(tag=tag, request=request)))
        return reply

    async def abort(self, tag: int) -> None:
        await self.call.write(pb.ClientEvent(abort=pb.Abort(tag=tag)))

    async def wait(self, condition: Callable[[], object]) -> None:
        """Until `condition` holds, looked at after each message."""
        while not condition():
            assert self._reader is not None
            if self._reader.done():
                self._reader.result()
                raise AssertionError("the session has ended")
            self._changed.clear()
            await self._changed.wait()

    async def end(self, reply: Reply) -> Reply:
        await self.wait(lambda: reply.ended)
        return reply

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """How the session ended."""
        if self._reader is not None:
            await self._reader
        return await status_of(self.call)

    def cancel(self) -> None:
        self.call.cancel()

    async def _read(self) -> None:
        try:
            async for outputs in self.call:
                self.num_messages += 1
                self.draining |= outputs.draining
                for output in outputs.outputs:
                    self.replies[output.tag].hear(output)
                for tag, delta in rows(outputs.deltas):
                    self.replies[tag].hear_delta(delta)
                for output in outputs.ends:
                    self.replies[output.tag].hear(output)
                self._changed.set()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
        finally:
            self._changed.set()
