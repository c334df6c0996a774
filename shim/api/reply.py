"""One reply in the making: a generation as a message, as events, and as usage."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import metrics, sse
from aiexport_edge.shim.api.messages_request import MessagesRequest
from aiexport_edge.shim.catalog import Listed
from aiexport_edge.shim.engines.generation import Generation
from aiexport_edge.shim.errors import ApiError
from aiexport_edge.shim.exchange import Exchange
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.usage import Entry

_STOP_REASONS = {
    pb.FINISH_END_TURN: "end_turn",
    pb.FINISH_MAX_TOKENS: "max_tokens",
    pb.FINISH_STOP_SEQUENCE: "stop_sequence",
}


class Reply:
    """One reply in the making: what has been taken from the generation, as message, events and usage."""

    def __init__(self, request: MessagesRequest, listed: Listed, generation: Generation, exchange: Exchange) -> None:
        self.listed = listed
        self.generation = generation
        self.exchange = exchange
        self.message_id = new_id("msg_")
        self.entry: Entry | None = None
        self.outcome = "completed"
        self.model = request.model
        self._opened = False

    @property
    def has_begun(self) -> bool:
        """Its first text has been written: what comes from here on is text, or the end."""
        return self._opened and self.entry is not None and self.entry.first_token_at is not None

    def take(self) -> str:
        """What is new, counted. Raises what ended the generation."""
        entry, generation = self.entry, self.generation
        assert entry is not None
        text = generation.take()
        entry.output_tokens = generation.output_tokens
        if entry.first_token_at is None:
            entry.cached_tokens = generation.cached_tokens or 0
            if text:
                entry.first_token_at = datetime.now(UTC)
                self.exchange.facts["first_ms"] = round(self.exchange.seconds * 1000, 1)
                # once this turn's writes are done: the client waits for them
                asyncio.get_running_loop().call_soon(self._observe_first, self.exchange.seconds)
        return text

    def _observe_first(self, seconds: float) -> None:
        metrics.FIRST_TOKEN_SECONDS.labels(self.listed.id).observe(seconds)

    def events(self) -> tuple[bytes, bool]:
        """What is new as events, and whether there will be more."""
        try:
            text = self.take()
        except ApiError as error:
            self.outcome = "failed"
            return sse.error(error, self.exchange.request_id), False
        finished = self.generation.finished
        if self._opened and finished is None:  # what a step mostly brings
            return sse.text_delta(text) if text else b"", True
        events = []
        if not self._opened:
            self._opened = True
            events += [sse.message_start(self.message()), sse.BLOCK_START]
        if text:
            events.append(sse.text_delta(text))
        if finished is not None:
            assert self.entry is not None
            events += [
                sse.BLOCK_STOP,
                sse.message_delta(**_ending(finished), output_tokens=self.entry.output_tokens),
                sse.MESSAGE_STOP,
            ]
        return b"".join(events), finished is None

    async def whole(self) -> dict[str, Any]:
        """The message once it is complete. Raises what ended the generation."""
        texts: list[str] = []

        def on_news() -> bool:
            texts.append(self.take())
            return self.generation.finished is not None

        await self.generation.follow(on_news)
        return self.message(text="".join(texts), finished=self.generation.finished)

    def message(self, *, text: str | None = None, finished: pb.Finished | None = None) -> dict[str, Any]:
        """The message object; without `finished` the one that opens a stream."""
        assert self.entry is not None
        return message_object(
            self.message_id,
            self.model,
            text,
            finished,
            prompt_tokens=self.entry.prompt_tokens,
            cached_tokens=self.entry.cached_tokens,
            output_tokens=self.entry.output_tokens,
        )

    def account(self, status: str) -> None:
        """Settles the counts: what never began has read nothing, and a whole reply that failed costs nothing."""
        entry = self.entry
        assert entry is not None
        if not self.generation.started or (status == "failed" and not self._opened):
            entry.prompt_tokens = entry.cached_tokens = entry.output_tokens = 0
        self.exchange.facts.update(
            outcome=status,
            input=entry.prompt_tokens - entry.cached_tokens,
            cached=entry.cached_tokens,
            output=entry.output_tokens,
        )
        metrics.MESSAGES.labels(entry.model, status).inc()
        metrics.TOKENS.labels(entry.model, "input").inc(entry.prompt_tokens - entry.cached_tokens)
        metrics.TOKENS.labels(entry.model, "cache_read").inc(entry.cached_tokens)
        metrics.TOKENS.labels(entry.model, "output").inc(entry.output_tokens)


def message_object(
    message_id: str,
    model: str,
    text: str | None,
    finished: pb.Finished | None,
    *,
    prompt_tokens: int,
    cached_tokens: int,
    output_tokens: int,
) -> dict[str, Any]:
    """The message object of the API. `model` is the id that was asked for; `finished` None: it has only begun."""
    ending = {"stop_reason": None, "stop_sequence": None} if finished is None else _ending(finished)
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [] if text is None else [{"type": "text", "text": text}],
        **ending,
        "usage": {
            "input_tokens": prompt_tokens - cached_tokens,
            "cache_read_input_tokens": cached_tokens,
            "output_tokens": 0 if finished is None else output_tokens,
        },
    }


def _ending(finished: pb.Finished) -> dict[str, Any]:
    reason = _STOP_REASONS[finished.reason]
    return {
        "stop_reason": reason,
        "stop_sequence": finished.stop_sequence if reason == "stop_sequence" else None,
    }
