"""Prefill by cost: steps stay short far into a prompt and beside decodes, and nobody waits forever for it."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_core import FakeCore, add_request, prompt_of

from aiexport_edge.engine.core.plan import Chunk
from aiexport_edge.engine.core.prefill_pace import FEWEST_TOKENS, PrefillPace, StepBudget, cost_of
from aiexport_edge.engine.core.protocol import Priority


@given(
    tokens=st.integers(1, 5000),
    cost=st.floats(0.5, 5000),
    start=st.integers(0, 300_000),
    num_left=st.integers(1, 300_000),
    span=st.one_of(st.just(math.inf), st.floats(10, 1e6)),
)
def test_a_chunk_keeps_to_tokens_and_cost(tokens: int, cost: float, start: int, num_left: int, span: float) -> None:
    budget = StepBudget(tokens, cost)
    taken = budget.take(start, num_left, span)
    assert 1 <= taken <= min(tokens, num_left)
    if taken > FEWEST_TOKENS:
        assert cost_of(start, taken, span) <= cost * (1 + 1e-9)
    if taken < num_left:
        assert not budget, "a request has one chunk in a step"
        if taken < tokens:
            assert cost_of(start, taken + 1, span) > cost * (1 - 1e-9), "no more was possible"


def test_without_a_pace_tokens_alone_count() -> None:
    budget = StepBudget(10)
    assert budget.take(1 << 20, 4) == 4
    assert budget.take(0, 100) == 6
    assert not budget


def chunks_of(core: FakeCore) -> list[Chunk]:
    return [chunk for model in core.plan.models for chunk in model.chunks]


def test_a_long_prompt_beside_decodes_comes_in_chunks_of_equal_cost() -> None:
    """The first chunk is large, the last is small, the decode is in every step, and alone it goes faster."""
    span = 50.0
    core = FakeCore(num_pages=400, max_step_tokens=200, pace=PrefillPace(beside_decodes=40, alone=400, spans=(span,)))
    core.add(add_request(1, [1], max_tokens=100))
    core.step()
    core.add(add_request(2, list(range(1000)), max_tokens=3))
    sizes = []
    while core.replies[2].ids == []:
        core.step()
        decode, *prefill = chunks_of(core)
        assert (decode.request.handle, decode.num_tokens) == (1, 1)
        for chunk in prefill:
            assert cost_of(chunk.start, chunk.num_tokens, span) <= 40 or chunk.num_tokens <= FEWEST_TOKENS
            sizes.append(chunk.num_tokens)
    assert sizes[0] > FEWEST_TOKENS == sizes[-2] >= sizes[-1]
    assert sum(sizes) == 1000
    core.run()
    core.check_outputs()

    alone = FakeCore(num_pages=400, max_step_tokens=200, pace=PrefillPace(beside_decodes=40, alone=400, spans=(span,)))
    alone.add(add_request(2, list(range(1000)), max_tokens=3))
    alone.run()
    assert alone.num_steps < len(sizes) / 2 + 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    beside=st.floats(1, 60),
    alone=st.floats(1, 200),
    spans=st.lists(st.one_of(st.just(math.inf), st.floats(2, 300)), min_size=2, max_size=2),
    num_pages=st.integers(20, 60),
    overlaps=st.booleans(),
)
def test_everything_ends_and_the_books_balance(
    seed: int, beside: float, alone: float, spans: list[float], num_pages: int, overlaps: bool
) -> None:
    rng = random.Random(seed)
    core = FakeCore(
        num_pages=num_pages,
        tokens_per_page=[4, 7],
        max_step_tokens=48,
        overlaps=overlaps,
        pace=PrefillPace(beside, alone, tuple(spans)),
    )
    longest = (num_pages - 1) * 4
    for handle in range(1, 16):
        num_prompt = rng.choice([rng.randint(1, 12), rng.randint(1, longest - 6)])
        prompt = prompt_of(rng, num_prompt)
        core.add(
            add_request(
                handle,
                prompt,
                model=rng.randrange(2),
                max_tokens=rng.randint(1, 6),
                tenant=f"tenant {rng.randrange(3)}",
                priority=rng.choice(list(Priority)),
                probation=rng.random() < 0.1,
            )
        )
        for _ in range(rng.randrange(3)):
            if not core.pipeline.busy:
                break
            core.step()
            handles = [chunk.request.handle for chunk in chunks_of(core)]
            assert len(set(handles)) == len(handles)
    core.run(max_steps=20_000)
    core.check_outputs()
