"""One request for text, over as many attempts as it takes.

Owns what has come back so far, which is also all that resuming needs: the output ids, the number of bytes of text, what
`Accepted` said. Fed by a session (`session.py`), placed by `engines.py`, read by one consumer: `follow`, and `take`
whenever it is told of news, within the session's own turn of the event loop.

    session ──on_delta──▶ [ text not yet taken, bounded ] ──take──▶ HTTP handler

A consumer that is too slow fills the buffer and loses the generation; the session never waits for it.
"""

from __future__ import annotations

import array
import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines.refusals import api_error
from aiexport_edge.shim.errors import ApiError, internal_error
from aiexport_edge.shim.images.sources import ImageData

if TYPE_CHECKING:
    from aiexport_edge.shim.engines.session import Session

T = TypeVar("T")

MAX_BUFFERED_BYTES = 256 << 10
MAX_STALLS = 3  # engines lost in a row while it ran and produced nothing: it may be what kills them


class ClientGone(Exception):
    """The consumer has left, or reads too slowly; nobody is told."""


class SessionLost(Exception):
    """The session ended before the engine answered a submission."""


class Refused(Exception):
    """The engine refused a submission."""

    def __init__(self, detail: pb.ErrorDetail) -> None:
        super().__init__(detail.message)
        self.detail = detail

    def error(self) -> ApiError:
        """What the REST client is told."""
        return api_error(self.detail)


class Generation:
    """A request and what came of it. Everything happens on one event loop."""

    __slots__ = (
        "_attempt",
        "_emitted_bytes",
        "_error",
        "_followed",
        "_ids",
        "_ids_at_attempt",
        "_max_buffered_bytes",
        "_on_news",
        "_on_text",
        "_running",
        "_stalls",
        "_taken_bytes",
        "_text",
        "_work",
        "accepted",
        "answer",
        "cached_tokens",
        "finished",
        "images",
        "output_tokens",
        "request",
        "session",
        "tag",
    )

    def __init__(
        self,
        request: pb.GenerateRequest,
        images: Sequence[ImageData] = (),
        *,
        max_buffered_bytes: int = MAX_BUFFERED_BYTES,
    ) -> None:
        self.request = request
        self.images = images  # those of its image blocks, in order; kept for as long as it may go on elsewhere
        self.accepted: pb.Accepted | None = None
        self._work: asyncio.Task[Any] | None = None
        self.cached_tokens: int | None = None  # of the first attempt that ran; None until then
        self.session: Session | None = None  # where it is placed now, and under which tag
        self.tag = 0
        self.answer: asyncio.Future[pb.Accepted] | None = None  # to the submission that is under way
        self.output_tokens = 0  # so far
        self.finished: pb.Finished | None = None
        self._ids = array.array("I")
        self._emitted_bytes = 0
        self._attempt = 0
        self._running = False  # in this attempt
        self._stalls = 0
        self._ids_at_attempt = 0
        self._text: list[str] = []
        self._taken_bytes = 0
        self._max_buffered_bytes = max_buffered_bytes
        self._error: Exception | None = None
        self._on_news: Callable[[], bool] | None = None
        self._on_text: Callable[[str, int], bool] | None = None
        self._followed: asyncio.Future[None] | None = None  # resolved when `_on_news` has had enough

    # ------------------------------------------------------------------------------------------ the consumer's side

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self.finished is not None or self._error is not None

    @property
    def started(self) -> bool:
        """An engine has begun to work on it."""
        return self.cached_tokens is not None

    async def follow(self, on_news: Callable[[], bool]) -> None:
        """Calls `on_news` whenever there is something new (a start, text, an end), until it returns True or raises.

        At the end it must take what there is: after an error it is called once more for the error itself.
        """
        self._on_news = on_news
        self._followed = asyncio.get_running_loop().create_future()
        try:
            if self.started or self.ended:
                self.tell()
            await self._followed
        finally:
            self._on_news = self._on_text = None

    def pass_text(self, on_text: Callable[[str, int], bool]) -> None:
        """From here on text that comes alone, with nothing before it left to take, goes to `on_text` first, with the
        number of output tokens so far: what a step mostly brings. Where it answers False, the text waits as ever.
        """
        self._on_text = on_text

    def tell(self) -> None:
        """Tells whoever follows that there is something new."""
        on_news = self._on_news
        if on_news is None:
            return
        try:
            if not on_news() and (self._error is None or not on_news()):
                return
        except Exception as error:
            self._leave(error)
        else:
            self._leave(None)

    def _leave(self, error: Exception | None) -> None:
        """The follower has had enough; an error of its own it gets where it waits."""
        self._on_news = self._on_text = None
        assert self._followed is not None
        if self._followed.done():
            return
        if error is None:
            self._followed.set_result(None)
        else:
            self._followed.set_exception(error)

    def take(self) -> str:
        """The text that has come and has not been taken. Raises what ended the generation once all is taken."""
        texts = self._text
        if not texts:
            if self._error is not None:
                raise self._error
            return ""
        text = texts[0] if len(texts) == 1 else "".join(texts)
        texts.clear()
        self._taken_bytes = self._emitted_bytes
        return text

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """The outcome of `work`, which is for this generation alone: it is cancelled where that fails meanwhile.

        Raises what it has failed with.
        """
        if self._error is not None:
            work.close()
            raise self._error
        working = asyncio.create_task(work)
        self._work = working
        try:
            return await working
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._error is None or (task is not None and task.cancelling()):
                raise
            raise self._error from None
        finally:
            self._work = None

    def fail(self, error: Exception) -> None:
        """Ends the generation from this side, unless it has ended."""
        if self.ended:
            return
        self._error = error
        self._on_text = None
        if isinstance(error, ClientGone):
            self._text.clear()
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)
        if self._work is not None:
            self._work.cancel()
        self.tell()

    # ------------------------------------------------------------------------------------------ the engine's side

    def name_images(self, upload_ids: Iterable[str]) -> None:
        """The image blocks stand for these, which the engine that is asked next has."""
        blocks = (
            block
            for message in self.request.chat.messages
            for block in message.content
            if block.WhichOneof("block") == "image"
        )
        for block, upload_id in zip(blocks, upload_ids, strict=True):
            block.image.upload_id = upload_id

    def submission(self) -> pb.GenerateRequest:
        """What is submitted now: the request, and on a further attempt all that came before."""
        if self.accepted is not None:
            self._attempt += 1
            self.request.resume.CopyFrom(
                pb.Resume(
                    attempt=self._attempt,
                    forced_ids=self._ids,
                    emitted_bytes=self._emitted_bytes,
                    prompt_tokens=self.accepted.prompt_tokens,
                    max_tokens=self.accepted.max_tokens,
                    model_revision=self.accepted.model_revision,
                    adapter_digest=self.accepted.adapter_digest,
                )
            )
            self.request.sampling.seed = self.accepted.seed
        self._ids_at_attempt = len(self._ids)
        self._running = False
        return self.request

    def on_accepted(self, accepted: pb.Accepted) -> None:
        if self.accepted is None:
            self.accepted = accepted
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(accepted)

    def on_refused(self, detail: pb.ErrorDetail) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(Refused(detail))

    def on_started(self, started: pb.Started) -> None:
        self._running = True
        if self.cached_tokens is None:
            self.cached_tokens = started.cached_tokens
            self.tell()

    def on_delta(self, text: str, ids: Sequence[int], output_tokens: int, emitted_bytes: int) -> None:
        """More of the reply; the counters are cumulative."""
        self._ids.extend(ids)
        self.output_tokens = output_tokens
        if not text:
            return
        self._emitted_bytes = emitted_bytes
        on_text = self._on_text
        if on_text is not None and not self._text:
            try:
                if on_text(text, output_tokens):
                    self._taken_bytes = emitted_bytes
                    return
            except Exception as error:
                self._leave(error)
                return
        self._text.append(text)
        if self._emitted_bytes - self._taken_bytes > self._max_buffered_bytes:
            self.fail(ClientGone("reads too slowly"))
            if self.session is not None:
                self.session.abort(self.tag)
        else:
            self.tell()

    def on_finished(self, finished: pb.Finished) -> None:
        if self.ended:
            return
        self.output_tokens = finished.output_tokens
        if finished.reason == pb.FINISH_ABORTED:  # nobody here asked for it
            self.fail(internal_error())
            return
        self.finished = finished
        self.tell()

    def on_failed(self, detail: pb.ErrorDetail) -> None:
        self.fail(api_error(detail))

    def on_lost(self) -> bool:
        """The session is gone. Returns whether to go on elsewhere; the caller then submits again."""
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(SessionLost())
            return False  # whoever waits for the answer decides
        if self.ended:
            return False
        if len(self._ids) > self._ids_at_attempt:
            self._stalls = 0
        elif self._running:
            self._stalls += 1
        if self._stalls >= MAX_STALLS:
            self.fail(internal_error())
        return not self.ended
