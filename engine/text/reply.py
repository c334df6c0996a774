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
    """Text of ids fed in order. Ids in `stop_ids` end a turn and are no text, whatever their spelling.

    `sent_bytes` of the text (UTF-8) have been sent by an earlier attempt and are not sent again. `emitted_bytes` counts
    what has been sent in all.
    """

    def __init__(
        self,
        decode_bytes: Callable[[int], bytes],
        *,
        strip_space: bool,
        stop_ids: Collection[int],
        stops: Sequence[str],
        sent_bytes: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(decode_bytes, strip_space=strip_space)
        self._stop_ids = stop_ids
        self._matcher = StopMatcher(stops) if stops else None
        self._bytes = 0  # of the text that is certain
        self.emitted_bytes = sent_bytes

    def feed(self, ids: Sequence[int]) -> Piece:
        """The text that becomes certain by `ids`. After a stop sequence or an id of `stop_ids` nothing is fed."""
        feed, matcher = self._detokenizer.feed, self._matcher
        if matcher is None and len(ids) == 1 and ids[0] not in self._stop_ids:  # what a step mostly brings
            return Piece(self._unsent(feed(ids[0])), 1, None)
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
        return Piece(self._unsent("".join(parts)), len(ids), None)

    def flush(self) -> Piece:
        """The rest, where the reply has ended: U+FFFD for half a character, and what may have been a stop sequence."""
        text, stop = self._detokenizer.flush(), None
        if self._matcher is not None:
            text, stop = self._matcher.feed(text)
            if stop is None:
                text += self._matcher.flush()
        return Piece(self._unsent(text), 0, stop)

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
