"""What one session has yet to be told. Owns the coalescing and the bound; knows no sockets.

Everything of one turn of the event loop goes into one message, and while the client is slow to read, into the same: a
request's deltas are joined. The engine never waits: past the bound in bytes or age the outbox overflows and says so
once.

A message and what it brings on (an event to each of its connections) cost the same whether it holds one token of each
request or three. So where steps follow each other faster than `STEADY_S` and bring tokens to `MANY` requests or more,
steps share a message, for 10 ms at most: a stream then has up to 200 events a second, not 1,000. An answer, a start,
a first token and an end never wait.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from aiexport_edge.proto import engine_pb2 as pb

_OUTPUT_BYTES = 32  # what an output weighs besides its text and ids
STEADY_S = 0.005  # between two messages to a session with many streams, if nothing in them is urgent
MANY = 32  # rows; with fewer, what a message costs does not matter


@dataclass(frozen=True, slots=True)
class OutboxBound:
    """How much a session may leave unread, in bytes and in seconds."""

    max_bytes: int = 8 << 20
    max_age_s: float = 20.0


DEFAULT_BOUND = OutboxBound()


_Row = tuple[str, Sequence[int], int, int]  # text, ids, output tokens, emitted bytes


class _Pending:
    """A message in the making."""

    def __init__(self) -> None:
        self.outputs: list[pb.Output] = []
        self.ends: list[pb.Output] = []
        self.ended: set[int] = set()  # tags of `ends`
        self.rows: dict[int, _Row] = {}  # a tag's delta

    @property
    def is_empty(self) -> bool:
        return not (self.outputs or self.rows or self.ends)

    def message(self, *, draining: bool) -> pb.StepOutputs:
        outputs = pb.StepOutputs(outputs=self.outputs, draining=draining, ends=self.ends)
        if self.rows:
            texts, token_ids, output_tokens, emitted_bytes = zip(*self.rows.values(), strict=True)
            deltas = outputs.deltas
            deltas.tags.extend(self.rows)
            deltas.texts.extend(texts)
            deltas.token_ids.extend(chain.from_iterable(token_ids))
            if len(deltas.token_ids) != len(self.rows) or not all(token_ids):
                deltas.num_token_ids.extend(map(len, token_ids))
            deltas.output_tokens.extend(output_tokens)
            deltas.emitted_bytes.extend(emitted_bytes)
        return outputs


class Outbox:
    """Filled on the event loop, emptied by the one task that writes to the client."""

    def __init__(self, on_overflow: Callable[[], None], bound: OutboxBound) -> None:
        self._on_overflow = on_overflow
        self._bound = bound
        self._pending = _Pending()
        self._complete: deque[_Pending] = deque()  # messages before it, which nothing is added to
        self._bytes = 0
        self._since = 0.0  # when the oldest pending output came
        self._taken_at = 0.0
        self._urgent = False  # something pending must not wait for the next step
        self._draining = False
        self._closed = False
        self._discarding = False
        self._overflowed = False
        self._wake = asyncio.Event()

    def accepted(self, tag: int, accepted: pb.Accepted) -> None:
        self._begin(tag)
        self._add(_OUTPUT_BYTES).outputs.append(pb.Output(tag=tag, accepted=accepted))

    def refused(self, tag: int, detail: pb.ErrorDetail) -> None:
        self._begin(tag)
        self._add(_OUTPUT_BYTES + len(detail.message)).outputs.append(pb.Output(tag=tag, refused=detail))

    def started(self, tag: int, cached_tokens: int) -> None:
        self._add(_OUTPUT_BYTES).outputs.append(pb.Output(tag=tag, started=pb.Started(cached_tokens=cached_tokens)))

    def delta(self, tag: int, text: str, ids: Sequence[int], *, output_tokens: int, emitted_bytes: int) -> None:
        """More of a reply; the counters are cumulative. `ids` is kept and must not change."""
        num_bytes = _OUTPUT_BYTES + len(text) + 4 * len(ids)
        rows = self._pending.rows
        before = rows.get(tag)
        is_first = output_tokens == len(ids)
        if before is not None:
            text, ids = before[0] + text, [*before[1], *ids]
        if before is None and not is_first and 0 < self._bytes < self._bound.max_bytes - num_bytes:
            self._bytes += num_bytes  # a further row of a step: as `_add`, but for the age, which has not changed
        else:
            rows = self._add(num_bytes, urgent=is_first).rows
        rows[tag] = (text, ids, output_tokens, emitted_bytes)

    def finished(self, tag: int, finished: pb.Finished) -> None:
        self._end(tag, _OUTPUT_BYTES, pb.Output(tag=tag, finished=finished))

    def failed(self, tag: int, detail: pb.ErrorDetail) -> None:
        self._end(tag, _OUTPUT_BYTES + len(detail.message), pb.Output(tag=tag, failed=detail))

    def drain(self) -> None:
        """From here on every message says that the engine drains, the next one at once."""
        self._draining = self._urgent = True
        self._wake.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._wake.set()

    def discard(self) -> None:
        """Nothing more will be sent: what is pending and what still comes is thrown away."""
        self._discarding = True
        self._pending = _Pending()
        self._complete.clear()
        self.close()

    async def take(self) -> pb.StepOutputs | None:
        """The next message, as soon as there is one. None once closed and empty."""
        await self._wake.wait()
        if len(self._pending.rows) >= MANY:
            await self._hold()
        if self._discarding:
            return None
        if self._complete:
            return self._complete.popleft().message(draining=self._draining)
        pending = self._pending
        if self._closed:
            if pending.is_empty:
                return None
        else:
            self._wake.clear()
        self._pending = _Pending()
        self._bytes = 0
        self._urgent = False
        self._taken_at = time.monotonic()
        return pending.message(draining=self._draining)

    async def _hold(self) -> None:
        """Until the first step after `STEADY_S` since the last message, or something urgent, or twice that time."""
        until, deadline = self._taken_at + STEADY_S, self._taken_at + 2 * STEADY_S
        while not (self._urgent or self._complete or self._closed) and (now := time.monotonic()) < until:
            self._wake.clear()
            try:
                async with asyncio.timeout(deadline - now):
                    await self._wake.wait()
            except TimeoutError:
                self._wake.set()
                return

    def _begin(self, tag: int) -> None:
        """A tag that is used again begins in another message than that in which it ends."""
        if tag in self._pending.ended:
            self._complete.append(self._pending)
            self._pending = _Pending()

    def _end(self, tag: int, num_bytes: int, output: pb.Output) -> None:
        pending = self._add(num_bytes)
        pending.ends.append(output)
        pending.ended.add(tag)

    def _add(self, num_bytes: int, *, urgent: bool = True) -> _Pending:
        now = time.monotonic()
        if self._bytes == 0:
            self._since = now
        self._bytes += num_bytes
        self._urgent = self._urgent or urgent
        if not self._overflowed and (self._bytes > self._bound.max_bytes or now - self._since > self._bound.max_age_s):
            self._overflowed = True
            self._on_overflow()
        self._wake.set()
        return self._pending
