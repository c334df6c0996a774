"""The tokens of a model as bytes: which text they spell, and the fewest that spell a given text.

Knows no grammar. Tokens without bytes (control tokens, ids that the tokenizer does not have) spell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_TOKEN_BYTES = 32  # longer tokens are runs of blanks and the like: no ending needs them
_UTF8_BYTES = (*b"\t\n", *range(0x20, 0xC0), *range(0xC2, 0xF5))


class Vocabulary:
    """`tokens[id]` are the bytes of an id; `stop_ids` end a turn; `size` is how many logits the model has."""

    def __init__(self, tokens: Sequence[bytes], stop_ids: Sequence[int], size: int) -> None:
        self.tokens = list(tokens[:size])
        self.stop_ids = frozenset(id_ for id_ in stop_ids if id_ < size)  # some directories name ids past the last
        self.size = size
        for id_ in self.stop_ids:
            if id_ < len(self.tokens):
                self.tokens[id_] = b""
        self._ids: dict[bytes, int] = {}
        lengths: dict[int, set[int]] = {}
        for id_, token in enumerate(self.tokens):
            if 0 < len(token) <= MAX_TOKEN_BYTES and token not in self._ids:
                self._ids[token] = id_
                lengths.setdefault(token[0], set()).add(len(token))
        self.spells_all = all(bytes((byte,)) in self._ids for byte in _UTF8_BYTES)  # every text has tokens
        self._lengths = {first: tuple(sorted(found, reverse=True)) for first, found in lengths.items()}

    def bytes_of(self, id_: int) -> bytes:
        """What an id spells; nothing for a control token."""
        return self.tokens[id_] if id_ < len(self.tokens) else b""

    def encode(self, text: bytes) -> list[int] | None:
        """The fewest tokens that spell `text`; of as few, those with the longest first. None where none do."""
        size = len(text)
        fewest = [0] * (size + 1)
        first = [-1] * size
        ids, lengths = self._ids, self._lengths
        for start in range(size - 1, -1, -1):
            best = size + 1
            for length in lengths.get(text[start], ()):
                end = start + length
                if end <= size and fewest[end] + 1 < best:
                    id_ = ids.get(text[start:end])
                    if id_ is not None:
                        best, first[start] = fewest[end] + 1, id_
            fewest[start] = best
        if size and fewest[0] > size:
            return None
        spelled: list[int] = []
        place = 0
        while place < size:
            spelled.append(first[place])
            place += len(self.tokens[first[place]])
        return spelled
