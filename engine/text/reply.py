"""The text of one reply as its ids come: decoded, cut at a stop sequence, and only what has not been sent before.

Owns the order of these three. Knows no requests and no budget.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from aiexport_edge.engine.text.detokenizer import Detokenizer
from aiexport_edge.engine.text.stops import StopMatcher


class Piece(NamedTuple):
    """What some ids bring: `text` to send now, how many of the ids belong to the reply, and the stop sequence that ends
    it, None while it goes on.
    """

    text: str
    num_ids: int
    stop: str | None


class ReplyText:
    """Text of ids fed in order. Ids in `stop_ids` end a turn and are no text, whatever their spelling. `ascii_texts` is
    for all replies of a tokenizer: what they have found of its ids.

    `sent_bytes` of the text (UTF-8) have been sent by an earlier attempt and are not sent again. `emitted_bytes` counts
    what has been sent in all.
    """

    __slots__ = (
        "_ascii_texts",
        "_bytes",
        "_decode_bytes",
        "_detokenizer",
        "_flows",
        "_matcher",
        "_stop_ids",
        "emitted_bytes",
    )

    def __init__(
        self,
        decode_bytes: Callable[[int], bytes],
        *,
        strip_space: bool,
        stop_ids: Collection[int],
        stops: Sequence[str],
        sent_bytes: int = 0,
        ascii_texts: dict[int, str] | None = None,
    ) -> None:
        self._ascii_texts = {} if ascii_texts is None else ascii_texts
        self._decode_bytes = decode_bytes
        self._detokenizer = Detokenizer(decode_bytes, strip_space=strip_space)
        self._stop_ids = stop_ids
        self._matcher = StopMatcher(stops) if stops else None
        self._bytes = 0  # of the text that is certain
        self.emitted_bytes = sent_bytes
        # Text goes out as it comes: none is held back, looked at for a stop sequence, or sent already. Kept, because a
        # token costs less the fewer objects it touches: after a step's pause none of them is in the caches.
        self._flows = self._can_flow()

    def feed_one(self, token_id: int) -> str | None:
        """As `feed` of one id, where that is whole characters of ASCII that can be sent as they are: what a step mostly
        brings, in one call. None where it is not; then nothing has been fed.
        """
        if not self._flows or token_id in self._stop_ids:
            return None
        text = self._ascii_texts.get(token_id)
        if text is None:
            data = self._decode_bytes(token_id)
            if not data or not data.isascii():
                return None
            text = self._ascii_texts[token_id] = data.decode("ascii")
        self._bytes = self.emitted_bytes = self.emitted_bytes + len(text)
        return text

    def feed(self, ids: Sequence[int]) -> Piece:
        """The text that becomes certain by `ids`. After a stop sequence or an id of `stop_ids` nothing is fed."""
        feed, matcher = self._detokenizer.feed, self._matcher
        parts: list[str] = []
        for num_ids, token_id in enumerate(ids, start=1):
            if token_id in self._stop_ids:
                return Piece(self._unsent("".join(parts)), num_ids, None)
            text = feed(token_id)
            if matcher is not None and text:
                text, stop = matcher.feed(text)
                if stop is not None:
                    return Piece(self._unsent("".join([*parts, text])), num_ids, stop)
            parts.append(text)
        unsent = self._unsent("".join(parts))
        self._flows = self._can_flow()
        return Piece(unsent, len(ids), None)

    def flush(self) -> Piece:
        """The rest, where the reply has ended: U+FFFD for half a character, and what may have been a stop sequence."""
        text, stop = self._detokenizer.flush(), None
        if self._matcher is not None:
            text, stop = self._matcher.feed(text)
            if stop is None:
                text += self._matcher.flush()
        return Piece(self._unsent(text), 0, stop)

    def _can_flow(self) -> bool:
        return self._matcher is None and self._detokenizer.is_empty and self._bytes == self.emitted_bytes

    def _unsent(self, text: str) -> str:
        """Of text that has become certain, what is not sent yet; counts it as sent."""
        if not text:
            return text
        before = self._bytes
        self._bytes += len(text) if text.isascii() else len(text.encode())
        if self._bytes <= self.emitted_bytes:
            return ""
        if before < self.emitted_bytes:
            text = text.encode()[self.emitted_bytes - before :].decode("utf-8", "replace")
        self.emitted_bytes = self._bytes
        return text
