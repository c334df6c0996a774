"""The shortest way to end a document, in tokens of a vocabulary.

It is the shortest text that completes the document (`document.py`), in the fewest tokens that spell it. Mostly only
whether it fits is asked, and there is room for one token a byte: then nothing is computed. Nearer the end of the budget
the tokens of its parts, remembered for each state, are added up, which is never less; only where these do not fit
either, the whole text is spelled.
"""

from __future__ import annotations

from aiexport_edge.engine.structured.document import Positions, Reader
from aiexport_edge.engine.structured.vocabulary import Vocabulary

_NEVER = 1 << 60


class Endings:
    """Of one grammar and one vocabulary; shared by all replies with both."""

    def __init__(self, reader: Reader, vocabulary: Vocabulary) -> None:
        self.reader = reader
        self.vocabulary = vocabulary
        self._num_tokens: dict[int, int] = {}  # of a state's tail alone

    def shortest(self, positions: Positions) -> list[int] | None:
        """Its tokens; None where the vocabulary has none for it."""
        return self.vocabulary.encode(self.reader.ending(positions))

    def fit(self, positions: Positions, room: int) -> bool:
        """Whether `shortest` has at most `room` tokens."""
        if self.vocabulary.spells_all and self.reader.num_bytes_left(positions) <= room:
            return True
        if sum(map(self._of_tail, self.reader.states_to_end(positions))) <= room:
            return True
        end = self.shortest(positions)
        return end is not None and len(end) <= room

    def _of_tail(self, state: int) -> int:
        count = self._num_tokens.get(state)
        if count is None:
            spelled = self.vocabulary.encode(self.reader.tail(state))
            count = self._num_tokens[state] = _NEVER if spelled is None else len(spelled)
        return count
