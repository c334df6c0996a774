"""What one session has yet to be told. Owns the coalescing and the bound; knows no sockets.

Everything of one turn of the event loop goes into one message, and while the client is slow to read, into the same: a
request's deltas are joined. The engine never waits: past the bound in bytes or age the outbox overflows and says so
once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiexport_edge.proto import engine_pb2 as pb

_OUTPUT_BYTES = 32  # what an output weighs besides its text and ids


@dataclass(frozen=True, slots=True)
class OutboxBound:
    """How much a session may leave unread, in bytes and in seconds."""

    max_bytes: int = 8 << 20
    max_age_s: float = 20.0


DEFAULT_BOUND = OutboxBound()


class Outbox:
    """Filled on the event loop, emptied by the one task that writes to the client."""

    def __init__(self, on_overflow: Callable[[], None], bound: OutboxBound) -> None:
        self._on_overflow = on_overflow
        self._bound = bound
        self._pending = pb.StepOutputs()
        self._deltas: dict[int, pb.Delta] = {}  # by tag: the delta in `_pending` that more can be joined to
        self._bytes = 0
        self._since = 0.0  # when the oldest pending output came
        self._draining = False
        self._closed = False
        self._discarding = False
        self._overflowed = False
        self._wake = asyncio.Event()

    def accepted(self, tag: int, accepted: pb.Accepted) -> None:
        self._add(_OUTPUT_BYTES).outputs.add(tag=tag, accepted=accepted)

    def refused(self, tag: int, detail: pb.ErrorDetail) -> None:
        self._add(_OUTPUT_BYTES + len(detail.message)).outputs.add(tag=tag, refused=detail)

    def started(self, tag: int, cached_tokens: int) -> None:
        self._add(_OUTPUT_BYTES).outputs.add(tag=tag, started=pb.Started(cached_tokens=cached_tokens))

    def delta(self, tag: int, text: str, ids: Sequence[int], *, output_tokens: int, emitted_bytes: int) -> None:
        """More of a reply; the counters are cumulative."""
        delta = self._deltas.get(tag)
        if delta is None:
            pending = self._add(_OUTPUT_BYTES + len(text) + 4 * len(ids))
            delta = self._deltas[tag] = pending.outputs.add(tag=tag, delta=pb.Delta(text=text, token_ids=ids)).delta
        else:
            self._add(len(text) + 4 * len(ids))
            delta.text += text
            delta.token_ids.extend(ids)
        delta.output_tokens = output_tokens
        delta.emitted_bytes = emitted_bytes

    def finished(self, tag: int, finished: pb.Finished) -> None:
        self._add(_OUTPUT_BYTES).outputs.add(tag=tag, finished=finished)
        self._deltas.pop(tag, None)

    def failed(self, tag: int, detail: pb.ErrorDetail) -> None:
        self._add(_OUTPUT_BYTES + len(detail.message)).outputs.add(tag=tag, failed=detail)
        self._deltas.pop(tag, None)

    def drain(self) -> None:
        """From here on every message says that the engine drains, the next one at once."""
        self._draining = True
        self._wake.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._wake.set()

    def discard(self) -> None:
        """Nothing more will be sent: what is pending and what still comes is thrown away."""
        self._discarding = True
        self._pending = pb.StepOutputs()
        self._deltas.clear()
        self.close()

    async def take(self) -> pb.StepOutputs | None:
        """The next message, as soon as there is one. None once closed and empty."""
        await self._wake.wait()
        self._wake.clear()
        if self._closed:
            self._wake.set()
            if self._discarding or not self._pending.outputs:
                return None
        pending, self._pending = self._pending, pb.StepOutputs()
        pending.draining = self._draining
        self._deltas.clear()
        self._bytes = 0
        return pending

    def _add(self, num_bytes: int) -> pb.StepOutputs:
        now = time.monotonic()
        if self._bytes == 0:
            self._since = now
        self._bytes += num_bytes
        if not self._overflowed and (self._bytes > self._bound.max_bytes or now - self._since > self._bound.max_age_s):
            self._overflowed = True
            self._on_overflow()
        self._wake.set()
        return self._pending
