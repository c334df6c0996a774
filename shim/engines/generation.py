"""One request for text, over as many attempts as it takes.

Owns what has come back so far, which is also all that resuming needs: the output ids, the number of bytes of text, what
`Accepted` said. Fed by a session (`session.py`), placed by `engines.py`, read by one consumer: `wait`, then `take`.

    session ──on_delta──▶ [ text not yet taken, bounded ] ──take──▶ HTTP handler

A consumer that is too slow fills the buffer and loses the generation; the session never waits for it.
"""

from __future__ import annotations

import array
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines.refusals import api_error
from aiexport_edge.shim.errors import internal_error

if TYPE_CHECKING:
    from aiexport_edge.shim.engines.session import Session

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


@dataclass(frozen=True, slots=True)
class Chunk:
    """What has come since the last one. `finished` is set in the last."""

    text: str
    output_tokens: int  # so far, this chunk included
    finished: pb.Finished | None


class Generation:
    """A request and what came of it. Everything happens on one event loop."""

    def __init__(self, request: pb.GenerateRequest, *, max_buffered_bytes: int = MAX_BUFFERED_BYTES) -> None:
        self.request = request
        self.accepted: pb.Accepted | None = None
        self.cached_tokens: int | None = None  # of the first attempt that ran; None until then
        self.session: Session | None = None  # where it is placed now, and under which tag
        self.tag = 0
        self.answer: asyncio.Future[pb.Accepted] | None = None  # to the submission that is under way
        self._ids = array.array("I")
        self._emitted_bytes = 0
        self._output_tokens = 0
        self._attempt = 0
        self._running = False  # in this attempt
        self._stalls = 0
        self._ids_at_attempt = 0
        self._text: list[str] = []
        self._taken_bytes = 0
        self._max_buffered_bytes = max_buffered_bytes
        self._finished: pb.Finished | None = None
        self._error: Exception | None = None
        self._news = False  # since the last `take`
        self._waiter: asyncio.Future[None] | None = None

    # ------------------------------------------------------------------------------------------ the consumer's side

    @property
    def ended(self) -> bool:
        """Nothing more will come."""
        return self._finished is not None or self._error is not None

    @property
    def started(self) -> bool:
        """An engine has begun to work on it."""
        return self.cached_tokens is not None

    async def wait(self, seconds: float) -> bool:
        """Whether there is something new: a start, text, an end. False when `seconds` pass without."""
        if self._news:
            return True
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = loop.call_later(seconds, _wake, waiter)
        try:
            await waiter
        finally:
            timer.cancel()
            self._waiter = None
        return self._news

    def take(self) -> Chunk:
        """Everything that has come and has not been taken. Raises what ended the generation once all is taken."""
        if self._error is not None and not self._text:
            raise self._error
        self._news = self._error is not None
        text = "".join(self._text)
        self._text.clear()
        self._taken_bytes = self._emitted_bytes
        return Chunk(text, self._output_tokens, self._finished if self._error is None else None)

    def fail(self, error: Exception) -> None:
        """Ends the generation from this side, unless it has ended."""
        if self.ended:
            return
        self._error = error
        if isinstance(error, ClientGone):
            self._text.clear()
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error)
        self._notify()

    # ------------------------------------------------------------------------------------------ the engine's side

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
            self._notify()

    def on_delta(self, text: str, ids: Sequence[int], output_tokens: int, emitted_bytes: int) -> None:
        """More of the reply; the counters are cumulative."""
        self._ids.extend(ids)
        self._output_tokens = output_tokens
        if not text:
            return
        self._emitted_bytes = emitted_bytes
        self._text.append(text)
        if self._emitted_bytes - self._taken_bytes > self._max_buffered_bytes:
            self.fail(ClientGone("reads too slowly"))
        else:
            self._notify()

    def on_finished(self, finished: pb.Finished) -> None:
        if self.ended:
            return
        self._output_tokens = finished.output_tokens
        if finished.reason == pb.FINISH_ABORTED:  # nobody here asked for it
            self.fail(internal_error())
            return
        self._finished = finished
        self._notify()

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

    def _notify(self) -> None:
        self._news = True
        if self._waiter is not None:
            _wake(self._waiter)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
