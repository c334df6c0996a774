"""Drafts: ids that a request may go on with, guessed beforehand and checked in the step that computes them.

Owns where guesses come from and how many are worth a step's while. Knows no tensors; how guesses are checked is the
runner's (`plan.Chunk.draft`), what becomes of them `commit`'s.

Guesses come from the request itself (prompt lookup; N. Yang et al., "Inference with Reference", 2023; A. Saxena, 2023):
where the last ids have come before, in the prompt or in the output, what followed them then may follow now. A grammar
that allows but one way on makes better ones. Each guess is a row more in a step that reads the same weights, and its
successor is drawn with the random number of its own position: the ids are what they would have been without drafts,
whatever is guessed; a wrong guess costs its row.

Whether guesses are right is seen without drafting: what is foretold is compared with every id that comes. So a text
that repeats nothing costs a look at an index, and drafts begin where they would have been right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from aiexport_edge.engine.core.request import Request

MOST_GUESSES = 8  # in a draft
_CONTEXT = 3  # ids that must have come before, for what followed them to be a guess
_ID_BITS = 21  # of an id in a key; _CONTEXT of them in an int64
_SHORT = 8192  # ids that are indexed one by one; more are sorted, which takes less memory and is slower to look up
_MEMORY = 0.9  # what an outcome weighs after the next one
_FIRST_HITS, _FIRST_TRIALS = 1.0, 3.0  # a third of guesses come true, until more is known
_FORCED = 0.95  # how likely an id is that a grammar forces: the same bytes may be spelled otherwise
LIGHT_CHANCE = 0.6  # where a row needs a better one to pay, drafts gain little, and nobody looks for them
_WORTH_SITTING_OUT = 2.5  # ids that a draft must promise where a request with one misses the step in between


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What a row more costs in a step, in units of a row without context: a step of n rows takes `base` + n.

    `spans` are by model (`PrefillPace`): a row at position p counts for 1 + p / span. A step has at most `most_rows`
    rows of a model's decodes.
    """

    base: float
    spans: tuple[float, ...]
    most_rows: int


class StepLoad:
    """What a step of one model computes so far, and whether a row more pays: it does where its chance of bringing an id
    is above what the ids of the step cost anyway, on average."""

    __slots__ = ("_base", "_ids", "_rows")

    def __init__(self, base: float) -> None:
        self._base = base
        self._ids = 0.0
        self._rows = 0.0

    def add(self, num_ids: float, cost: float) -> None:
        """Count work that brings so many ids, or tokens of a prompt, and costs so many rows."""
        self._ids += num_ids
        self._rows += cost

    def pays(self, chance: float, cost: float) -> bool:
        """Whether a row that costs `cost` and brings an id with this chance raises the rate of ids."""
        return chance * (self._base + self._rows) > cost * self._ids


class Drafter:
    """What one request's ids foretell. `look` first, whenever it may have more of them; ids are never taken back."""

    __slots__ = ("_at", "_found", "_hits", "_ids", "_keys", "_num_ids", "_places", "_trials")

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids  # the request's own list
        self._num_ids = 0  # those of it that have been looked at
        self._at = -1  # the index of what is foretold to come next
        self._hits, self._trials = _FIRST_HITS, _FIRST_TRIALS
        self._keys: npt.NDArray[np.int64] | None = None  # of the ids there were at first, sorted
        self._places: npt.NDArray[np.int32] | None = None  # and the places after them
        self._found: dict[int, int] = {}  # the place after each key of the ids that came later

    @property
    def chance(self) -> float:
        """How likely a guess comes true, where those before it have."""
        return self._hits / self._trials

    @property
    def is_worth_sitting_out(self) -> bool:
        """Whether a request does better with a draft in every second step than without in every one."""
        if self._at < 0:
            return False
        chance = min(self.chance, 0.999)
        return (1 - chance ** (MOST_GUESSES + 1)) / (1 - chance) >= _WORTH_SITTING_OUT

    def guesses(self, most: int) -> tuple[int, ...]:
        """The next ids, at most so many, as foretold: what repeats itself goes on doing so. None where nothing is."""
        at, ids, num_ids = self._at, self._ids, self._num_ids
        if at < 0:
            return ()
        if at + most <= num_ids:
            return tuple(ids[at : at + most])
        period = num_ids - at
        return tuple([ids[at + index % period] for index in range(most)])

    def look(self, num_ids: int) -> None:
        """The first `num_ids` of the request's ids are known by now."""
        if self._keys is None:
            self._learn(num_ids)
            return
        ids, found, at = self._ids, self._found, self._at
        for index in range(self._num_ids, num_ids):
            id_ = ids[index]
            if at >= 0:
                is_hit = ids[at] == id_
                self._hits = self._hits * _MEMORY + is_hit
                self._trials = self._trials * _MEMORY + 1
                at = at + 1 if is_hit else -1
            if index + 1 >= _CONTEXT:
                key = _key(ids[index - 2], ids[index - 1], id_)
                if at < 0:
                    at = self._find(key)
                found[key] = index + 1
        self._at, self._num_ids = at, num_ids

    def _find(self, key: int) -> int:
        """The place after the last time that the key's ids came, or -1."""
        place = self._found.get(key, -1)
        if place >= 0:
            return place
        if self._places is None:
            return -1
        assert self._keys is not None
        index = int(self._keys.searchsorted(key, side="right")) - 1
        return int(self._places[index]) if index >= 0 and self._keys[index] == key else -1

    def _learn(self, num_ids: int) -> None:
        """Index the ids that are there at first, the prompt's above all: a tenth of a microsecond each."""
        import numpy as np  # the scheduler's tests, and whoever else imports it, need none

        self._num_ids = num_ids
        array = np.array(self._ids[:num_ids], dtype=np.int64)
        keys = (array[:-2] << (2 * _ID_BITS)) | (array[1:-1] << _ID_BITS) | array[2:]
        if num_ids <= _SHORT:
            found = self._found
            for place, key in enumerate(keys.tolist()[:-1], _CONTEXT):
                found[key] = place
            self._keys = keys[:0].copy()  # not a view, which would keep all of them
        else:
            order = np.argsort(keys[:-1], kind="stable")
            self._keys, self._places = keys[order], (order + _CONTEXT).astype(np.int32)
        if len(keys):  # the last ids themselves: where have they come before?
            last = int(keys[-1])
            self._at = self._find(last)
            self._found[last] = num_ids


def _key(first: int, second: int, third: int) -> int:
    return (first << (2 * _ID_BITS)) | (second << _ID_BITS) | third


def foretold(request: Request) -> tuple[float, tuple[int, ...]]:
    """What is foretold of a request, all whose ids are known: how likely each guess is to come true after the one
    before it, and MOST_GUESSES of them at most."""
    drafter = request.drafter
    assert drafter is not None
    drafter.look(len(request.token_ids))
    if request.constraint is not None:
        forced = request.constraint.forced_ids()
        if forced:
            return _FORCED, tuple(forced[:MOST_GUESSES])
    return drafter.chance, drafter.guesses(MOST_GUESSES)


def num_worth(chance: float, most: int, load: StepLoad, cost: float) -> int:
    """How many guesses, of at most `most`, pay in a step of this load, to which they are added: each a row of this
    cost."""
    count, reached = 0, chance
    while count < most and load.pays(reached, cost):
        load.add(reached, cost)
        reached *= chance
        count += 1
    return count


def row_cost(position: int, span: float) -> float:
    """Of a row at `position`, in units of one without context."""
    return 1.0 if math.isinf(span) else 1 + position / span
