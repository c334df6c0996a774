"""How much prefill a step takes: as much as those who decode beside it, or arrive meanwhile, can wait for.

A token's cost grows with its position, since it attends to all before it. In units of a token at position 0:

    cost(position) = 1 + position / span

where `span` is the position at which attention costs as much as all else. So a chunk at the end of a long prompt has
fewer tokens than one at its beginning, and steps take about the same time. Knows no tensors and no requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FEWEST_TOKENS = 16  # of a chunk, whatever they cost: fewer would read the keys and values before them for nothing


@dataclass(frozen=True, slots=True)
class PrefillPace:
    """Limits of a step's prefill in units of cost: where it runs beside decodes, and where nobody decodes. `spans` are
    by model, infinite for one whose tokens all cost the same.
    """

    beside_decodes: float
    alone: float
    spans: tuple[float, ...]


class StepBudget:
    """What is left of a step for prefill, in tokens and in cost."""

    __slots__ = ("_cost", "tokens")

    def __init__(self, tokens: int, cost: float = math.inf) -> None:
        self.tokens = tokens
        self._cost = cost

    def __bool__(self) -> bool:
        """Whether there is room for another chunk."""
        return self.tokens > 0 and self._cost > 0

    def take(self, start: int, num_left: int, span: float = math.inf) -> int:
        """Spend on a request of which `num_left` tokens from position `start` are to be computed; how many now, at
        least one. Where they are not all of them, the budget is empty."""
        most = min(num_left, self.tokens)
        num_tokens = min(most, max(_tokens_for(self._cost, start, span), FEWEST_TOKENS))
        self.tokens -= num_tokens
        # Nothing is left where the cost has cut a chunk short: a request has one chunk in a step.
        self._cost = 0.0 if num_tokens < most else self._cost - cost_of(start, num_tokens, span)
        return num_tokens

    def reserve(self, cost: float) -> None:
        """Leave so much of the step to work that is not prefill."""
        self._cost -= cost

    def give_back(self, start: int, num_tokens: int, span: float = math.inf) -> None:
        """Take back what was spent on a chunk, whole as it was asked for."""
        self.tokens += num_tokens
        self._cost += cost_of(start, num_tokens, span)


def cost_of(start: int, num_tokens: int, span: float) -> float:
    """Of a chunk that begins at position `start`."""
    return num_tokens * (1 + (start + num_tokens / 2) / span)


def _tokens_for(cost: float, start: int, span: float) -> int:
    """The most tokens from `start` on that cost at most `cost`: the root of n + n(2·start + n) / (2·span) = cost."""
    if math.isinf(cost):
        return 1 << 62
    if math.isinf(span):
        return int(cost)
    base = 1 + start / span
    return int(span * (math.sqrt(base * base + 2 * cost / span) - base))
