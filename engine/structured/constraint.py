"""One reply in JSON mode: which tokens may come, and the end in time.

Owns the guarantee: whatever is drawn, the reply is a whole document within its budget. After every token of the reply

    shortest_end(document so far)  <=  tokens left of the budget                                   (all in tokens)

holds: a drawn token after which it would not is not taken; the shortest end is written instead, at once, and the reply
is over. So a reply with a smaller budget is a longer one's beginning and its shortest end. This does not lean on the
library's masks: they make the model choose well, but what does not continue the document is not taken either.

What the shortest end is: `endings.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiexport_edge.engine.structured.document import Positions
from aiexport_edge.engine.structured.endings import Endings
from aiexport_edge.engine.structured.grammar import Matcher

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class NoRoom(Exception):
    """The budget does not do for any document; the shortest needs `num_tokens`."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens


class NotABeginning(Exception):
    """No document begins with the prefix; or it is one already (`is_whole`)."""

    def __init__(self, *, is_whole: bool) -> None:
        super().__init__()
        self.is_whole = is_whole


class NotSpellable(Exception):
    """The vocabulary has no tokens for the document's shortest end."""


@dataclass(frozen=True, slots=True)
class Step:
    """What became of drawn ids: `ids` are the reply's. `over`: the document is whole; `cut`: because of the budget."""

    ids: list[int]
    over: bool
    cut: bool


class Constraint:
    """The document of one reply. `prefix` is what the prompt holds of it already; `matcher` None: no masks (`fill` is
    not for such).

    Raises `NotABeginning`, `NotSpellable` and `NoRoom`.
    """

    def __init__(self, endings: Endings, *, prefix: bytes, max_tokens: int, matcher: Matcher | None = None) -> None:
        self._endings = endings
        self._reader = reader = endings.reader
        self._vocabulary = endings.vocabulary
        self._positions = reader.read(reader.beginning, prefix)
        if not self._positions:
            raise NotABeginning(is_whole=False)
        if reader.is_over(self._positions):
            raise NotABeginning(is_whole=True)
        end = endings.shortest(self._positions)
        if end is None:
            raise NotSpellable
        if max(1, len(end)) > max_tokens:
            raise NoRoom(max(1, len(end)))
        self._left = max_tokens
        self._matcher = matcher
        if matcher is not None and prefix:
            spelled = self._vocabulary.encode(prefix)
            if spelled is None or not matcher.consume(spelled):
                self._matcher = None

    @property
    def num_tokens_left(self) -> int:
        """Of the budget."""
        return self._left

    @property
    def shortest_end(self) -> list[int]:
        """Tokens of the shortest end; none where the document may end here."""
        end = self._endings.shortest(self._positions)
        assert end is not None, "a token without a way to the end is not taken"
        return end

    def replay(self, ids: Sequence[int]) -> bool:
        """Takes in what an earlier attempt at this reply has taken. Whether the document is whole."""
        for id_ in ids:
            if id_ in self._vocabulary.stop_ids:
                return True
            self._positions = self._reader.read(self._positions, self._vocabulary.bytes_of(id_))
            if not self._positions:
                raise NotABeginning(is_whole=False)
            self._left -= 1
        if self._matcher is not None and ids and not self._matcher.consume(list(ids)):
            self._matcher = None
        return self._reader.is_over(self._positions)

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """The tokens that may come next, as bits (`Matcher.fill`). Where the library gives none, all: what is drawn is
        looked at anyway."""
        if self._matcher is not None:
            self._matcher.fill(row)
            if not self._matcher.spent and row.any():
                return
            self._matcher = None
        row[:] = -1

    def fill_ahead(self, rows: npt.NDArray[np.int32], draft: Sequence[int]) -> int:
        """`rows` [1 + len(draft), words]: the tokens that may come next, and after each guess of `draft` where those
        before it come. Returns how many rows say what `fill` would; the others allow everything. Takes nothing in."""
        self.fill(rows[0])
        rows[1:] = -1
        if self._matcher is None:
            return len(rows)
        ahead = self._matcher.copy()
        for number, id_ in enumerate(draft, 1):
            if not rows[number - 1, id_ >> 5] >> (id_ & 31) & 1 or not ahead.consume([id_]):
                return number
            ahead.fill(rows[number])
            if ahead.spent or not rows[number].any():
                rows[number] = -1
                return number
        return len(rows)

    def forced_ids(self) -> list[int]:
        """The tokens that must come next, spelled as the vocabulary's own text would be; empty where it is open."""
        return [] if self._matcher is None else self._matcher.forced()

    def advance(self, drawn: Sequence[int]) -> Step:
        """Takes drawn ids in. Of those past the document's end none is the reply's."""
        taken: list[int] = []
        for id_ in drawn:
            if id_ in self._vocabulary.stop_ids and self._reader.num_bytes_left(self._positions) == 0:
                return Step([*taken, id_], over=True, cut=False)
            positions = self._after(id_)
            if not positions:
                return Step([*taken, *self.shortest_end], over=True, cut=True)
            taken.append(id_)
            self._positions = positions
            self._left -= 1
            if self._reader.is_over(positions):
                return Step(taken, over=True, cut=False)
            if self._left == 0:
                return Step(taken, over=True, cut=True)
            if self._matcher is not None and not self._matcher.consume([id_]):
                self._matcher = None
        return Step(taken, over=False, cut=False)

    def _after(self, id_: int) -> Positions:
        """Where a drawn token leads; empty where it may not be taken."""
        data = self._vocabulary.bytes_of(id_)
        positions = self._reader.within_depth(self._reader.read(self._positions, data)) if data else ()
        return positions if positions and self._endings.fit(positions, self._left - 1) else ()
