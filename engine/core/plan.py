"""What the scheduler hands to the runner each step, what comes back, and how a runner is driven. Imports no torch.

Where a runner overlaps steps, the next is planned and launched while this one's ids travel back:

    plan N+1 ─▶ launch N+1 ─▶ collect N ─▶ commit N ─▶ draw N+1 ─▶ plan N+2 ─▶ …
    device      |…… step N ……|…… step N+1: forward ……|… its draws …|

The draws of requests without a constraint are part of the launch; those with one wait for `draw`, when the constraint
has been told every id before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec

from aiexport_edge.engine.core.drafts import DraftCost
from aiexport_edge.engine.core.pictures import Eyes, Key
from aiexport_edge.engine.core.prefill_pace import PrefillPace
from aiexport_edge.engine.core.protocol import AdapterRoom
from aiexport_edge.engine.core.request import Request

# Stands in `Request.token_ids` for an id that a planned step draws and that has not been committed.
PENDING_ID = -1


class Chunk(msgspec.Struct, frozen=True):
    """Compute `num_tokens` of `request` from position `start` (its `num_computed_tokens` when planned).

    Its `pages` already cover positions up to `end`. `samples` says whether the last of them is the request's last
    token, so that a new id is drawn from its logits, for position `end`. The id at `end - 1` may be PENDING_ID where
    the runner overlaps steps, and then only: it is the one that the step before draws.

    With a `draft`, the last of its tokens are not the request's but guesses, for the positions after its own last one.
    An id is drawn for each of their places and for the one after: as many ids count as guesses come true, and one more.

    A struct because a step makes hundreds: 0.1 µs each, a frozen dataclass takes 1.0.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool
    draft: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """The position after the last that is computed; that of the last id that is drawn, if one is."""
        return self.start + self.num_tokens

    @property
    def own_end(self) -> int:
        """The position after the request's own last token in it; that of the first id that is drawn, if one is."""
        return self.start + self.num_tokens - len(self.draft)

    @property
    def output_index(self) -> int:
        """The index, in the request's output, of the first id that is drawn."""
        return self.start + self.num_tokens - len(self.draft) - self.request.num_prompt_tokens


class Encode(msgspec.Struct, frozen=True):
    """Do the next `num_units` of the vision tower's work on the picture `index` of `request`, known by `key` from then
    on; what comes out is there for the chunks of the same step."""

    request: Request
    index: int
    key: Key
    num_units: int


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model's share of a step: decodes first, then chunks of prefills. There may be nothing but `encodes`."""

    model: int
    chunks: list[Chunk]
    encodes: list[Encode] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step for this model."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step over all models of the core; a model with nothing to do is not in it. It may be of no model at all.

    `dropped` are pictures that are not needed from now on: they go before anything else is done.
    """

    models: list[ModelPlan]
    dropped: list[Key] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StepResult:
    """New ids by request handle, for every chunk that samples: one, and one more for each guess of a draft that came
    true. A request that had ended before `draw` may be missing. `faulty` are those whose logits had a NaN or nothing
    finite: their ids mean nothing.
    """

    ids: dict[int, list[int]]
    faulty: frozenset[int] = frozenset()


Launched = TypeVar("Launched")


class StepRunner(Protocol[Launched]):
    """What the core loop needs of a runner: the real one is in `runner.py`, tests have a small one of their own.

    For each plan it calls `launch`, `draw` and `collect`, in this order, and each of them in the order of the plans.
    Where `overlaps`, the next plan's `launch` comes before this one's `collect`, and not before its `draw`. All are
    called on one thread and raise on bugs only: the process then ends.

    `num_pages` counts page 0, which is never handed out; `tokens_per_page` and `weight_bytes` are by model.
    """

    @property
    def overlaps(self) -> bool:
        """Whether a step runs beside the host. A runner that computes on the calling thread does not overlap: each step
        is committed before the next is planned, so that no token is computed in vain."""
        ...

    @property
    def num_pages(self) -> int: ...

    @property
    def page_bytes(self) -> int: ...

    @property
    def max_step_tokens(self) -> int: ...

    @property
    def pace(self) -> PrefillPace | None:
        """How much prefill is good for a step; None: whatever `max_step_tokens` leaves."""
        ...

    @property
    def draft_cost(self) -> DraftCost | None:
        """What guesses cost; None: there are to be none."""
        ...

    @property
    def tokens_per_page(self) -> list[int]: ...

    @property
    def weight_bytes(self) -> list[int]: ...

    @property
    def eyes(self) -> list[Eyes | None]:
        """By model; None of one that sees nothing."""
        ...

    @property
    def picture_bytes(self) -> int:
        """What there is room for of the features of pictures."""
        ...

    @property
    def adapter_room(self) -> AdapterRoom:
        """Of each model."""
        ...

    def launch(self, plan: StepPlan) -> Launched:
        """Begin to compute every chunk of `plan`, and draw an id for each that samples and has no constraint.

        What it needs of requests and their pages is read before it returns.
        """
        ...

    def draw(self, launched: Launched) -> None:
        """Draw the ids of chunks whose requests have a constraint, under its mask: all earlier ids are committed.

        Of a request that has ended since `launch`, the constraint is not asked any more.
        """
        ...

    def collect(self, launched: Launched) -> StepResult:
        """Wait for the ids."""
        ...
