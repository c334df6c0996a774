"""Which decodes of a step get a draft, and how long: as far as it pays, out of what nobody else has use for.

Owns the rules between the scheduler's plan and what requests foretell (`drafts.py`). Preempts nobody and keeps nobody
waiting. Knows no tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from aiexport_edge.engine.core.drafts import LIGHT_CHANCE, DraftCost, StepLoad, foretold, num_worth, row_cost
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.plan import Chunk
from aiexport_edge.engine.core.request import Request


class Drafting:
    """Lengthens decodes. `tokens_per_page` is by model."""

    def __init__(self, costs: DraftCost, pool: PagePool, tokens_per_page: Sequence[int]) -> None:
        self._costs = costs
        self._pool = pool
        self._tokens_per_page = tokens_per_page
        self._light_below = LIGHT_CHANCE * costs.base / (1 - LIGHT_CHANCE)  # decodes

    def without_those_that_sit_out(self, decoding: Collection[Request]) -> list[Request]:
        """Those of `decoding` that are planned for beside a step in flight. Left out are those of which it is not known
        how many ids that step brings, and those that do better with a draft in the next, for which all must be known.
        """
        is_light = len(decoding) < self._light_below
        return [request for request in decoding if not _sits_out(request, is_light)]

    def add(self, decodes: list[Chunk], prefills: Sequence[Chunk], *, num_left: int, num_kept: float) -> None:
        """Give drafts to those of `decodes` for which they pay beside `prefills`: `num_left` tokens in all at most, and
        none that would leave fewer than `num_kept` pages."""
        if len(decodes) >= self._light_below:
            return
        candidates = []
        for index, chunk in enumerate(decodes):
            if not chunk.request.num_in_flight:
                chance, guesses = foretold(chunk.request)
                if guesses:
                    candidates.append((index, chance, guesses))
        if not candidates:
            return
        spans = self._costs.spans
        loads = [StepLoad(self._costs.base) for _ in spans]
        num_rows = [0] * len(spans)
        for chunk in [*decodes, *prefills]:
            model = chunk.request.model
            middle = chunk.start + chunk.num_tokens // 2
            loads[model].add(chunk.num_tokens, chunk.num_tokens * row_cost(middle, spans[model]))
        for chunk in decodes:
            num_rows[chunk.request.model] += 1
        for index, chance, guesses in candidates:
            request, start = decodes[index].request, decodes[index].start
            model = request.model
            budget_left = request.num_prompt_tokens + request.max_tokens - len(request.token_ids)
            most = min(len(guesses), num_left, self._costs.most_rows - num_rows[model], budget_left - 1)
            count = num_worth(chance, most, loads[model], row_cost(start, spans[model]))
            if count and not self._has_room(request, start + 1 + count, num_kept):
                count = len(request.pages) * self._tokens_per_page[model] - start - 1
            if count > 0:
                decodes[index] = Chunk(request, start, 1 + count, samples=True, draft=guesses[:count])
                num_left -= count
                num_rows[model] += count

    def _has_room(self, request: Request, end: int, num_kept: float) -> bool:
        """Whether the request's pages reach up to `end`, or may be made to."""
        missing = -(-end // self._tokens_per_page[request.model]) - len(request.pages)
        if missing > 0:
            if missing + num_kept > self._pool.num_available:
                return False
            request.pages.extend(self._pool.take(missing))
        return True


def _sits_out(request: Request, is_light: bool) -> bool:
    if request.is_drafted or not is_light or not request.num_in_flight:
        return request.is_drafted
    assert request.drafter is not None
    request.drafter.look(len(request.token_ids) - 1)
    return request.drafter.is_worth_sitting_out
