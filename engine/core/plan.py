"""What the scheduler hands to the runner each step, and what comes back. Values only; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec

from aiexport_edge.engine.core.request import Request

# Stands in `Request.token_ids` for an id that has been drawn on the device but has not reached the host.
PENDING_ID = -1


class Chunk(msgspec.Struct, frozen=True):
    """Compute `num_tokens` of `request` from position `start` (its `num_computed_tokens` when planned).

    Its `pages` already cover positions up to `start + num_tokens`. `samples` says whether the last of them is the
    request's last token, so that a new id is drawn from its logits.

    A struct because a step makes hundreds: 0.1 µs each, a frozen dataclass takes 1.0.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model's share of a step: decodes first, then chunks of prefills."""

    model: int
    chunks: list[Chunk]

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step for this model."""
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step over all models of the core; a model with nothing to do is not in it."""

    models: list[ModelPlan]


@dataclass(frozen=True, slots=True)
class StepResult:
    """New ids by request handle, for every chunk that samples: one id today, several with speculation."""

    ids: dict[int, list[int]]


class StepRunner(Protocol):
    """What the core loop needs of a runner: the real one is in `runner.py`, tests have a small one of their own.

    `num_pages` counts page 0, which is never handed out; `tokens_per_page` and `weight_bytes` are by model.
    """

    @property
    def num_pages(self) -> int: ...

    @property
    def page_bytes(self) -> int: ...

    @property
    def tokens_per_page(self) -> list[int]: ...

    @property
    def weight_bytes(self) -> list[int]: ...

    def step(self, plan: StepPlan) -> StepResult:
        """Compute every chunk of `plan`, on the calling thread. Raises on bugs only: the process then ends."""
        ...
