"""A small engine that speaks the gRPC contract over a real socket and replies by a rule instead of a model.

The reply to a user text "COUNT 5" is the tokens "0 ", "1 ", … "4 ": token i is `count_token(i)`, whose text is the
number, so that a lost or repeated token shows. Everything else (pace, refusals, deaths) is for the test to say.
It keeps the session's rules: answers every Submit once, Started before Deltas, resumes from `forced_ids` and
`emitted_bytes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto import engine_pb2_grpc

T = TypeVar("T")
CONTEXT_WINDOW = 4096
MAX_OUTPUT_TOKENS = 2048


def reply_tokens(request: pb.GenerateRequest) -> list[str]:
    """The tokens of a full reply: a function of the request alone. Some characters take several tokens."""
    text = request.chat.messages[-1].content[0].text
    words = text.split()
    count = int(words[1]) if len(words) > 1 and words[0] == "COUNT" else 3
    unit = words[2] if len(words) > 2 else ""
    return [f"{i}{unit} " for i in range(count)]


@dataclass
class Seen:
    """What a test can ask of the engine afterwards."""

    submitted: list[pb.Submit] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    hellos: list[str] = field(default_factory=list)
    uploads: list[list[bytes]] = field(default_factory=list)  # the files of each call that was answered
    uploads_begun: list[str] = field(default_factory=list)  # the model's name of each
    uploads_over: list[str] = field(default_factory=list)
    listings: list[str] = field(default_factory=list)  # an element each time the models are asked for


class ScriptedEngine(engine_pb2_grpc.EngineServicer):
    """Runs in a thread of its own; every public method may be called from the test's."""

    def __init__(
        self, address: str, *, models: tuple[str, ...] = ("demo",), credentials: grpc.ServerCredentials | None = None
    ) -> None:
        self.address = address
        self._credentials = credentials
        self.seen = Seen()
        self.revision = "r1"
        self.state = pb.MODEL_READY
        self.cached_tokens = 0
        self.refuse: pb.ErrorDetail | None = None  # the answer to every Submit while it is set
        self.refuse_resume: pb.ErrorDetail | None = None
        self.fail_after: tuple[int, pb.ErrorDetail] | None = None  # tokens, then Failed
        self.accept_silently = False  # never answers a Submit
        self.vision = False
        self.refuse_images: pb.ErrorDetail | None = None  # the answer to every upload while it is set
        self.hang_images = False  # never answers an upload
        self.load: tuple[int, int] | None = None  # running and waiting, as Stats says; None: what there is
        self.core_pid = 0  # as Stats says
        self.late_listings = 0  # that many calls of ListModels get no answer, of those that wait for less than 10 s
        self._models = models
        self._changed = threading.Condition()
        self._free = asyncio.Event()  # set: tokens come at once
        self._permits = asyncio.Semaphore(0)  # else one a token
        self._starts = asyncio.Event()  # set: requests are scheduled at once
        self._answers = asyncio.Event()  # set: ListModels answers
        self._sessions: set[asyncio.Queue[pb.StepOutputs | None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._health = HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.free_run()
        self.hold_starts(False)
        self.hang(False)

    # ---------------------------------------------------------------------------------------- for the test

    def start(self) -> None:
        self._call(self._start())

    def kill(self) -> None:
        """All connections break at once, as when the process dies."""
        self._call(self._stop())

    def disconnect(self) -> None:
        """The sessions end; the engine goes on."""

        def end() -> None:
            for outbox in self._sessions:
                outbox.put_nowait(None)

        self._loop.call_soon_threadsafe(end)

    def close(self) -> None:
        self.kill()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def free_run(self) -> None:
        self._loop.call_soon_threadsafe(self._free.set)

    def pause(self) -> None:
        """From here on a token needs a permit."""
        self._loop.call_soon_threadsafe(self._free.clear)

    def permit(self, num_tokens: int) -> None:
        def release() -> None:
            for _ in range(num_tokens):
                self._permits.release()

        self._loop.call_soon_threadsafe(release)

    def hold_starts(self, hold: bool) -> None:
        self._loop.call_soon_threadsafe(self._starts.clear if hold else self._starts.set)

    def hang(self, hang: bool) -> None:
        """While it hangs, ListModels gets no answer."""
        self._loop.call_soon_threadsafe(self._answers.clear if hang else self._answers.set)

    def set_serving(self, serving: bool) -> None:
        """What the health service says of the engine."""
        self._call(self._set_serving(serving))

    def drain(self) -> None:
        """Says that it takes no new requests."""

        def say() -> None:
            for outbox in self._sessions:
                outbox.put_nowait(pb.StepOutputs(draining=True))

        self._loop.call_soon_threadsafe(say)

    def wait_for(self, condition: Callable[[Seen], bool], what: str, seconds: float = 20.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.seen), seconds), f"not seen: {what}"

    # ---------------------------------------------------------------------------------------- the contract

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        self._note(self.seen.listings, "")
        if self.late_listings and context.time_remaining() < 10:
            self.late_listings -= 1
            await asyncio.Event().wait()
        await self._answers.wait()
        return pb.ListModelsResponse(
            models=[
                pb.ModelInfo(
                    name=name,
                    state=self.state,
                    revision=self.revision,
                    context_window=CONTEXT_WINDOW,
                    max_output_tokens=MAX_OUTPUT_TOKENS,
                    deterministic=True,
                    vision=self.vision,
                )
                for name in self._models
            ]
        )

    async def Stats(self, request: pb.StatsRequest, context: Any) -> pb.StatsResponse:
        models = [pb.ModelStats(name=name, running=1, prompt_tokens=100, cached_tokens=25) for name in self._models]
        running, waiting = self.load or (len(self._tasks), 0)
        return pb.StatsResponse(
            running=running,
            waiting=waiting,
            pages_total=10,
            pages_used=4,
            uptime_s=7200,
            core_pid=self.core_pid,
            models=models,
        )

    async def UploadImages(self, events: AsyncIterator[pb.UploadEvent], context: Any) -> AsyncIterator[Any]:
        files: list[list[bytes]] = []
        model = ""
        try:
            async for event in events:
                match event.WhichOneof("event"):
                    case "model":
                        model = event.model
                        self._note(self.seen.uploads_begun, model)
                    case "header":
                        files.append([])
                    case "chunk":
                        files[-1].append(event.chunk)
                    case "end":
                        break
            if self.refuse_images is not None:
                trailer = (("aiexport-error-detail-bin", self.refuse_images.SerializeToString()),)
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "refused", trailer)
            if self.hang_images:
                await asyncio.Event().wait()
            whole = [b"".join(chunks) for chunks in files]
            self._note(self.seen.uploads, whole)
            number = len(self.seen.uploads)
            ids = [f"u{number}.{index}" for index in range(len(whole))]
            yield pb.UploadedImages(images=[pb.UploadedImage(id=name, prompt_tokens=4) for name in ids])
            async for _ in events:
                raise AssertionError("something came after the end")
        finally:
            self._note(self.seen.uploads_over, model)

    async def Session(self, events: AsyncIterator[pb.ClientEvent], context: Any) -> AsyncIterator[pb.StepOutputs]:
        outbox: asyncio.Queue[pb.StepOutputs | None] = asyncio.Queue()
        self._sessions.add(outbox)
        reader = asyncio.create_task(self._read(events, outbox))
        try:
            while (outputs := await outbox.get()) is not None:
                yield outputs
        finally:
            self._sessions.discard(outbox)
            reader.cancel()

    async def _read(self, events: AsyncIterator[pb.ClientEvent], outbox: asyncio.Queue[pb.StepOutputs | None]) -> None:
        running: dict[int, asyncio.Task[None]] = {}
        try:
            async for event in events:
                match event.WhichOneof("event"):
                    case "hello":
                        self._note(self.seen.hellos, event.hello.client)
                    case "submit":
                        self._note(self.seen.submitted, event.submit)
                        task = asyncio.create_task(self._generate(event.submit, outbox))
                        running[event.submit.tag] = task
                        self._tasks.add(task)
                        task.add_done_callback(self._tasks.discard)
                    case "abort":
                        aborted = running.pop(event.abort.tag, None)
                        if aborted is not None and not aborted.done():
                            aborted.cancel()
                            finished = pb.Finished(reason=pb.FINISH_ABORTED)
                            _put_end(outbox, pb.Output(tag=event.abort.tag, finished=finished))
                        self._note(self.seen.aborted, event.abort.tag)
        finally:
            for task in running.values():
                task.cancel()
            outbox.put_nowait(None)

    async def _generate(self, submit: pb.Submit, outbox: asyncio.Queue[pb.StepOutputs | None]) -> None:
        tag, request = submit.tag, submit.request
        resume = request.resume if request.HasField("resume") else pb.Resume()
        refusal = self.refuse or (self.refuse_resume if request.HasField("resume") else None)
        prompt_tokens = sum(len(m.content[0].text.split()) + 4 for m in request.chat.messages)
        if prompt_tokens > CONTEXT_WINDOW:
            refusal = pb.ErrorDetail(code=pb.ERROR_CONTEXT_LENGTH, limit=CONTEXT_WINDOW, actual=prompt_tokens)
        if request.HasField("resume") and resume.model_revision != self.revision:
            refusal = pb.ErrorDetail(code=pb.ERROR_REVISION_CHANGED, message="another model")
        if refusal is not None:
            _put(outbox, pb.Output(tag=tag, refused=refusal))
            return
        if self.accept_silently:
            return
        max_tokens = resume.max_tokens or min(request.max_tokens or 1024, CONTEXT_WINDOW - prompt_tokens)
        accepted = pb.Accepted(
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            seed=request.sampling.seed,
            model_revision=self.revision,
        )
        _put(outbox, pb.Output(tag=tag, accepted=accepted))
        await self._starts.wait()
        _put(outbox, pb.Output(tag=tag, started=pb.Started(cached_tokens=self.cached_tokens)))
        tokens = reply_tokens(request)
        text = "".join(tokens[:max_tokens])
        assert list(resume.forced_ids) == list(range(len(resume.forced_ids)))
        emitted = resume.emitted_bytes
        rest = "".join(tokens[: len(resume.forced_ids)]).encode()[emitted:]  # of the forced ids' text, not yet sent
        for index in range(len(resume.forced_ids), min(len(tokens), max_tokens)):
            if self.fail_after is not None and index >= self.fail_after[0]:
                _put_end(outbox, pb.Output(tag=tag, failed=self.fail_after[1]))
                return
            if self._free.is_set():
                await asyncio.sleep(0)
            else:
                await self._permits.acquire()
            piece, rest = rest + tokens[index].encode(), b""
            emitted += len(piece)
            deltas = pb.Deltas(
                tags=[tag],
                texts=[piece.decode()],
                token_ids=[index],
                output_tokens=[index + 1],
                emitted_bytes=[emitted],
            )
            outbox.put_nowait(pb.StepOutputs(deltas=deltas))
        reason = pb.FINISH_END_TURN if len(tokens) <= max_tokens else pb.FINISH_MAX_TOKENS
        stop_sequence = ""
        for stop in request.sampling.stop_sequences:
            if stop in text:
                reason, stop_sequence = pb.FINISH_STOP_SEQUENCE, stop
        finished = pb.Finished(
            reason=reason,
            stop_sequence=stop_sequence,
            prompt_tokens=prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=min(len(tokens), max_tokens),
        )
        _put_end(outbox, pb.Output(tag=tag, finished=finished))

    # ---------------------------------------------------------------------------------------- inside

    async def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(pb.DESCRIPTOR.services_by_name["Engine"].full_name, status)

    async def _start(self) -> None:
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 256 << 20), ("grpc.so_reuseport", 0)])
        engine_pb2_grpc.add_EngineServicer_to_server(self, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        await self._set_serving(True)
        if self._credentials is None:
            server.add_insecure_port(self.address)
        else:
            server.add_secure_port(self.address, self._credentials)
        await server.start()
        self._server = server

    async def _stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(grace=None)

    def _note(self, things: list[T], thing: T) -> None:
        with self._changed:
            things.append(thing)
            self._changed.notify_all()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        with contextlib.suppress(asyncio.CancelledError):
            return future.result(30)
        raise AssertionError("the engine's loop was stopped")


def _put(outbox: asyncio.Queue[pb.StepOutputs | None], output: pb.Output) -> None:
    outbox.put_nowait(pb.StepOutputs(outputs=[output]))


def _put_end(outbox: asyncio.Queue[pb.StepOutputs | None], output: pb.Output) -> None:
    outbox.put_nowait(pb.StepOutputs(ends=[output]))
