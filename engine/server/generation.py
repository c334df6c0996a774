"""A request's life in the engine process: refused or accepted, tokens in, text out, ended.

Owns its text state (detokenizer, stop sequences) and its counters; what it shares with others is its owner's
(`generations.py`). Knows no gRPC calls: what it has to say goes into an outbox.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from aiexport_edge.engine.backends.base import BackendRequest
from aiexport_edge.engine.core.protocol import AdapterRef, FinishReason, Sampling, pack_ids
from aiexport_edge.engine.server.adapters import ServedAdapter, check_resumed_adapter
from aiexport_edge.engine.server.errors import RequestError
from aiexport_edge.engine.server.models import Model, ModelText
from aiexport_edge.engine.server.outbox import Outbox
from aiexport_edge.engine.server.pictures import (
    HeldPicture,
    ImageBlock,
    are_uploaded,
    check_images,
    hold_all,
    hold_uploaded,
    image_blocks,
)
from aiexport_edge.engine.server.prompt import (
    INLINE_CHARACTERS,
    budget,
    check_model,
    check_request,
    continues_text,
    encode_prompt,
    num_characters,
    priority_of,
)
from aiexport_edge.engine.server.response_format import Format, constraint_of, is_constrained
from aiexport_edge.engine.text.reply import ReplyText
from aiexport_edge.engine.text.template import Encoded, Picture
from aiexport_edge.proto import engine_pb2 as pb

if TYPE_CHECKING:
    from aiexport_edge.engine.server.generations import Generations

log = logging.getLogger(__name__)

_REASONS = {
    FinishReason.END_TURN: pb.FINISH_END_TURN,
    FinishReason.MAX_TOKENS: pb.FINISH_MAX_TOKENS,
    FinishReason.ABORTED: pb.FINISH_ABORTED,
}


class Generation:
    """One request; the backend's listener for it."""

    __slots__ = (
        "_abort_asked",
        "_adapter",
        "_born",
        "_cached_tokens",
        "_first_token_at",
        "_handle",
        "_held",
        "_model_name",
        "_num_prompt_tokens",
        "_on_end",
        "_outbox",
        "_output_tokens",
        "_owner",
        "_replayed",
        "_request_id",
        "_started_at",
        "_stop_ids",
        "_tag",
        "_tenant",
        "_text",
        "_trace",
        "_waiting",
        "ended",
    )

    def __init__(
        self, owner: Generations, request: pb.GenerateRequest, outbox: Outbox, tag: int, on_end: Callable[[], None]
    ) -> None:
        self._owner = owner
        self._request_id = request.request_id
        self._model_name = request.model
        self._outbox = outbox
        self._tag = tag
        self._on_end = on_end
        self._tenant = request.tenant.id
        self._handle: int | None = None
        self.ended = False
        self._abort_asked = False
        self._waiting = False  # holds a place in the queue
        self._trace = None if owner.tracer is None else owner.tracer.begin(request)
        self._born = time.monotonic()
        self._started_at = self._first_token_at = 0.0
        self._num_prompt_tokens = self._cached_tokens = self._output_tokens = 0
        self._held: list[HeldPicture] = []  # until the end
        self._adapter: ServedAdapter | None = None
        self._replayed = ""  # text of an earlier attempt's ids, until Started is told

    # ------------------------------------------------------------------------------------------------ beginning

    def begin(self, request: pb.GenerateRequest) -> None:
        """Answers with Accepted or Refused: at once, or when a thread has tokenized or compiled what takes long."""
        try:
            if self._owner.draining:
                raise RequestError(pb.ERROR_QUEUE_FULL, "The engine is draining: it takes no new requests.")
            model, text = check_model(self._owner.models, request.model)
            check_request(request, model)
            if request.adapter:
                self._adapter = self._owner.adapters.find(request.adapter, model.facts.name)
            if request.HasField("resume"):
                check_resumed_adapter(request.resume, self._adapter)
            blocks = image_blocks(request.chat)
            check_images(blocks, model, self._owner.pictures)
            self._owner.admission.enter(self._tenant)
            self._waiting = True
            format_ = self._owner.formats.ready(request, model) if is_constrained(request) else None
            is_short = num_characters(request) <= INLINE_CHARACTERS and are_uploaded(blocks)
            if is_short and (format_ is not None or not is_constrained(request)):
                self._held = hold_uploaded(blocks, self._owner.pictures)
                self._accept(request, model, text, encode_prompt(request, model, text, self._pictures()), format_)
            else:
                if are_uploaded(blocks):  # at once: the client may end their call
                    self._held, blocks = hold_uploaded(blocks, self._owner.pictures), []
                self._owner.start_task(asyncio.create_task(self._begin_long(request, model, text, blocks)))
        except Exception as error:
            self._refuse(error)

    async def _begin_long(
        self, request: pb.GenerateRequest, model: Model, text: ModelText, blocks: Sequence[ImageBlock]
    ) -> None:
        """`blocks` are the images that are still to be decoded, all of them or none."""
        try:
            if blocks:
                self._hold(await hold_all(blocks, model.facts.vision, self._owner.pictures))
            prompt = await self._owner.in_thread(encode_prompt, request, model, text, self._pictures())
            format_ = None
            if is_constrained(request):
                format_ = await self._owner.formats.prepare(request, model, text)
            if not self.ended:
                self._accept(request, model, text, prompt, format_)
        except Exception as error:
            self._refuse(error)

    def _accept(
        self,
        request: pb.GenerateRequest,
        model: Model,
        text: ModelText,
        prompt: Encoded,
        format_: Format | None,
    ) -> None:
        prompt_ids = prompt.ids
        max_tokens = budget(request, model, len(prompt_ids))
        constraint, is_whole = (None, False) if format_ is None else constraint_of(request, format_, max_tokens)
        sampling = request.sampling
        seed = sampling.seed if sampling.HasField("seed") else secrets.randbits(64)
        self._stop_ids = frozenset() if sampling.ignore_eos else text.stop_ids
        self._text = ReplyText(
            text.tokenizer.decode_bytes,
            strip_space=text.tokenizer.strips_leading_space and not continues_text(request, text, prompt_ids),
            stop_ids=self._stop_ids,
            stops=() if constraint is not None else sampling.stop_sequences,  # they do not end a document
            sent_bytes=request.resume.emitted_bytes,
            ascii_texts=text.ascii_texts,
        )
        accepted = pb.Accepted(
            prompt_tokens=len(prompt_ids),
            max_tokens=max_tokens,
            seed=seed,
            model_revision=model.facts.revision,
            adapter_digest=b"" if self._adapter is None else self._adapter.digest,
        )
        forced = list(request.resume.forced_ids)
        asked = BackendRequest(
            model=model.index,
            prompt_ids=pack_ids(prompt_ids),
            output_ids=pack_ids(forced),
            max_tokens=max_tokens,
            stop_ids=tuple(self._stop_ids),
            sampling=Sampling(
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
                top_k=sampling.top_k if sampling.HasField("top_k") else 0,
                seed=seed,
            ),
            tenant=self._tenant,
            weight=request.tenant.weight or 1.0,
            salt=request.tenant.cache_salt,
            priority=priority_of(request),
            constraint=constraint,
            images=tuple(
                msgspec.structs.replace(held.image, start=start)
                for held, start in zip(self._held, prompt.starts, strict=True)
            ),
            adapter=None if self._adapter is None else AdapterRef(self._adapter.path, self._adapter.digest),
        )
        if not (forced or self._abort_asked):
            # The core first: telling the client takes up to a millisecond, in which the core could have begun.
            self._handle = self._owner.backend.submit(asked, self)
        self._num_prompt_tokens = len(prompt_ids)
        self._outbox.accepted(self._tag, accepted)
        if self._trace is not None:
            self._trace.accepted(len(prompt_ids), max_tokens)
        if self._abort_asked:
            self.abort()
        elif forced and not self._replay(forced, max_tokens, is_whole):
            self._handle = self._owner.backend.submit(asked, self)

    def _pictures(self) -> list[Picture]:
        return [held.picture for held in self._held]

    def _hold(self, held: list[HeldPicture]) -> None:
        if self.ended:
            for picture in held:
                picture.release()
        else:
            self._held = held

    def _replay(self, forced: list[int], max_tokens: int, is_whole: bool) -> bool:
        """Puts the ids of an earlier attempt through text and stops anew; whether the reply ends with them already, as
        it does where it is a document that `is_whole`."""
        piece = self._text.feed(forced)
        self._output_tokens = piece.num_ids
        if piece.stop is not None:
            self._deliver(piece.text, ())
            self._finish(pb.FINISH_STOP_SEQUENCE, piece.stop)
        elif is_whole or forced[-1] in self._stop_ids or len(forced) >= max_tokens:
            self._deliver(piece.text, ())
            ends_turn = is_whole or forced[-1] in self._stop_ids
            self.finished(FinishReason.END_TURN if ends_turn else FinishReason.MAX_TOKENS)
        else:
            self._replayed = piece.text
        return self.ended

    # ------------------------------------------------------------------------------------------------ from the backend

    def started(self, cached_tokens: int) -> None:
        self._started_at = time.monotonic()
        if self._trace is not None:
            self._trace.started(cached_tokens)
        self._cached_tokens = cached_tokens
        self._leave_queue()
        self._outbox.started(self._tag, cached_tokens)
        self._deliver(self._replayed, ())

    def tokens(self, ids: Sequence[int]) -> None:
        assert self._handle is not None
        if self._trace is not None:
            self._trace.step(len(ids))
        if not self._first_token_at:
            self._first_token_at = time.monotonic()
        try:
            if len(ids) == 1 and (text := self._text.feed_one(ids[0])) is not None:
                self._output_tokens += 1
                self._outbox.delta(
                    self._tag, text, ids, output_tokens=self._output_tokens, emitted_bytes=self._text.emitted_bytes
                )
                return
            piece = self._text.feed(ids)
        except Exception:  # a bug with this text: the others' go on
            log.exception("a reply could not be written", extra={"fields": {"request_id": self._request_id}})
            self._owner.backend.abort(self._handle)
            self.failed("The engine could not write this reply's text.")
            return
        self._output_tokens += piece.num_ids
        self._deliver(piece.text, ids if piece.num_ids == len(ids) else ids[: piece.num_ids])
        if piece.stop is not None:
            self._owner.backend.finish(self._handle)
            self._finish(pb.FINISH_STOP_SEQUENCE, piece.stop)

    def finished(self, reason: FinishReason) -> None:
        piece = self._text.flush()
        self._deliver(piece.text, ())
        if piece.stop is not None:
            self._finish(pb.FINISH_STOP_SEQUENCE, piece.stop)
        else:
            self._finish(_REASONS[reason])

    def failed(self, message: str) -> None:
        self._outbox.failed(self._tag, pb.ErrorDetail(code=pb.ERROR_INTERNAL, message=message))
        self._end("failed")

    def _deliver(self, text: str, ids: Sequence[int]) -> None:
        if text or ids:
            self._outbox.delta(
                self._tag, text, ids, output_tokens=self._output_tokens, emitted_bytes=self._text.emitted_bytes
            )

    # ------------------------------------------------------------------------------------------------ ends

    def abort(self) -> None:
        """The client has left or does not want it any more. Answered by Finished ABORTED, unless it had ended."""
        if self.ended:
            return
        if self._handle is not None:
            self._owner.backend.abort(self._handle)
        elif not self._num_prompt_tokens:  # not accepted yet: Accepted comes first
            self._abort_asked = True
            return
        self._finish(pb.FINISH_ABORTED)

    def drop(self) -> None:
        """As `abort`, where nobody listens any more."""
        if not self.ended:
            if self._handle is not None:
                self._owner.backend.abort(self._handle)
            self._end("dropped")

    def _refuse(self, error: Exception) -> None:
        if self.ended:
            return
        if self._num_prompt_tokens:  # a bug past Accepted
            log.error("a request could not begin", exc_info=error, extra={"fields": {"request_id": self._request_id}})
            self.failed("The engine could not begin this request.")
            return
        if isinstance(error, RequestError):
            detail = error.detail
        else:
            log.error("a request could not be read", exc_info=error, extra={"fields": {"request_id": self._request_id}})
            detail = pb.ErrorDetail(code=pb.ERROR_INTERNAL, message="The engine could not read this request.")
        self._outbox.refused(self._tag, detail)
        self._end(pb.ErrorCode.Name(detail.code))

    def _finish(self, reason: pb.FinishReason, stop_sequence: str = "") -> None:
        self._outbox.finished(
            self._tag,
            pb.Finished(
                reason=reason,
                stop_sequence=stop_sequence,
                prompt_tokens=self._num_prompt_tokens,
                cached_tokens=self._cached_tokens,
                output_tokens=self._output_tokens,
            ),
        )
        self._end(pb.FinishReason.Name(reason))

    def _end(self, outcome: str) -> None:
        self.ended = True
        self._leave_queue()
        for picture in self._held:
            picture.release()
        self._held = []
        self._owner.ended(self)
        self._on_end()
        if self._trace is not None:
            self._trace.end(outcome, cached_tokens=self._cached_tokens, output_tokens=self._output_tokens)
        now = time.monotonic()
        log.info(
            "request ended",
            extra={
                "fields": {
                    "request_id": self._request_id,
                    "model": self._model_name,
                    "outcome": outcome,
                    "prompt_tokens": self._num_prompt_tokens,
                    "cached_tokens": self._cached_tokens,
                    "output_tokens": self._output_tokens,
                    "queue_s": round((self._started_at or now) - self._born, 4),
                    "first_token_s": round(self._first_token_at - self._born, 4) if self._first_token_at else None,
                    "total_s": round(now - self._born, 4),
                }
            },
        )

    def _leave_queue(self) -> None:
        if self._waiting:
            self._waiting = False
            self._owner.admission.leave(self._tenant)
