"""What the next id of a request may be, beyond what its model makes of it: the seam between the core and grammars.

Owns that interface alone. Knows no grammar, no tensors and no scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bitmask = npt.NDArray[np.int32]  # [ceil(vocabulary / 32)]: bit i % 32 of word i // 32 says whether id i may come


class Taken(Protocol):
    """What became of drawn ids: `ids` are the output's; it ends with them if `over`, for want of budget if `cut`."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def over(self) -> bool: ...

    @property
    def cut(self) -> bool: ...


class Constraint(Protocol):
    """The state of one request's output, held by the request (`Request.constraint`) from its arrival to its end.

    `commit` hands it every drawn id, in order, but never the extra id of a request whose stop was seen a step late. The
    runner asks for a mask when it draws, and does so after every earlier id has been committed, also where steps
    overlap (`StepRunner.draw`). Forced ids of an earlier attempt are in it when it is made.
    """

    def fill(self, row: Bitmask) -> None:
        """Write into `row` which ids may come next; at least one may. It holds rubbish before."""
        ...

    def fill_ahead(self, rows: Bitmask, draft: Sequence[int]) -> int:
        """As `fill`, into each of `rows` [1 + len(draft), words]: what may come next, and what after each guess of
        `draft` if those before it come. Returns how many rows, at least one, hold what `fill` would say then; nothing
        counts that is drawn under the others, which allow everything. Takes nothing in.
        """
        ...

    def forced_ids(self) -> list[int]:
        """What comes next where there is but one way on, as it is usually spelled; empty where it is open."""
        ...

    def advance(self, drawn: Sequence[int]) -> Taken:
        """Take in drawn ids. It may answer with others where it ends the output, and then only."""
        ...
