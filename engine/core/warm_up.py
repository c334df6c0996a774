"""What a runner does before it serves: every operation once in each variant, and the steps that take the most memory.

Owns the made-up requests, which live in page 0. Decides nothing about serving.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiexport_edge.engine.core.constraint import Taken
from aiexport_edge.engine.core.decode_graphs import DecodeGraphs
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import Priority, Sampling
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.warm_up_pictures import picture_steps

if TYPE_CHECKING:
    from aiexport_edge.engine.core.constraint import Bitmask
    from aiexport_edge.engine.core.runner import Runner

SHORT = 16  # tokens: more rows than one tile of a product
Progress = Callable[[int, int], None]  # parts done, parts in all


def warm_up(runner: Runner, graphs: Sequence[DecodeGraphs], progress: Progress) -> None:
    """Run all that serving can meet once, so that nothing is compiled while serving but the graphs of other buckets.

    On a card that is: the first graphs of each model; prefills of every power of two of tokens, since launch settings
    go by the tokens of a sequence; draws with masks and without; a decode beside a prefill; the largest steps.
    """
    parts: list[Callable[[], None]] = []
    if graphs:
        for of_model in graphs:
            for adapted in (False, True) if of_model.has_adapters else (False,):
                parts += [_capture(of_model, bucket, adapted) for bucket in of_model.first_buckets]
        for model in range(len(graphs)):
            parts += [_step(runner, *chunks) for chunks in _card_variants(runner, model)]
            prompts = [dummy_request(runner, model, size) for size in _sizes(runner, model)]
            parts += [_plan(runner, plan) for plan in picture_steps(runner, model, prompts)]
            parts += [_step(runner, *chunks) for chunks in _adapted_steps(runner, model, _sizes(runner, model))]
        parts += [_step(runner, *chunks) for chunks in largest_steps(runner)]
    else:
        for model in range(runner.num_models):
            parts += [_step(runner, *chunks) for chunks in _short_steps(runner, model)]
            prompt = dummy_request(runner, model, _short(runner, model))
            parts += [_plan(runner, plan) for plan in picture_steps(runner, model, [prompt])]
    for done, part in enumerate(parts):
        progress(done, len(parts))
        part()
    progress(len(parts), len(parts))


def largest_steps(runner: Runner) -> list[list[Chunk]]:
    """What takes the most memory: for each model a prefill of a whole step, alone and shared by all rows, and the
    largest decode; and that decode beside what prefill fits into the step with it."""
    steps = []
    for model in range(runner.num_models):
        most = runner.context_windows[model] - 1
        longest = min(runner.max_step_tokens, most)
        num_rows = min(runner.max_num_running, runner.max_step_tokens)
        shared = max(1, min(runner.max_step_tokens // runner.max_num_running, most))
        rows = [dummy_request(runner, model, shared, row) for row in range(num_rows)]
        decodes = [Chunk(request, shared, 1, True) for request in rows]
        steps += [
            [Chunk(dummy_request(runner, model, longest), 0, longest, True)],
            [Chunk(request, 0, shared, True) for request in rows],
            decodes,
        ]
        rest = min(longest, runner.max_step_tokens - num_rows + 1)
        if num_rows > 1 and rest > 1:
            steps.append([*decodes[1:], Chunk(dummy_request(runner, model, rest), 0, rest, True)])
    return steps


def dummy_request(runner: Runner, model: int, num_tokens: int, row: int = 0, *, constrained: bool = False) -> Request:
    """A request of `num_tokens` and one more, all in page 0, with every sampling rule in use."""
    return Request(
        handle=-1 - 2 * row - constrained,
        model=model,
        token_ids=[0] * (num_tokens + 1),
        num_prompt_tokens=num_tokens,
        max_tokens=1,
        stop_ids=frozenset(),
        sampling=Sampling(temperature=1.0, top_p=0.9, top_k=8, seed=0),
        tenant="",
        weight=1.0,
        salt=b"",
        priority=Priority.INTERACTIVE,
        arrival=0,
        constraint=_Anything() if constrained else None,
        pages=[0] * -(-(num_tokens + 1) // runner.tokens_per_page[model]),
    )


def _short(runner: Runner, model: int) -> int:
    return min(SHORT, runner.max_step_tokens, runner.context_windows[model] - 1)


def _sizes(runner: Runner, model: int) -> list[int]:
    """Every power of two of tokens that fits into a step."""
    longest = min(runner.max_step_tokens, runner.context_windows[model] - 1)
    return [1 << power for power in range(longest.bit_length())]


def _adapted_steps(runner: Runner, model: int, sizes: Sequence[int]) -> list[list[Chunk]]:
    """Prompts of these sizes and a decode, with an adapter that adds nothing; none where the model can have none."""
    if not runner.has_adapters(model):
        return []
    steps = []
    for size in sizes:
        request = dummy_request(runner, model, size)
        request.adapter_slot = 0
        steps += [[Chunk(request, 0, size, samples=size > 1)], [Chunk(request, size, 1, samples=True)]]
    return steps


def _short_steps(runner: Runner, model: int) -> list[list[Chunk]]:
    num_tokens = _short(runner, model)
    request = dummy_request(runner, model, num_tokens)
    return [[Chunk(request, 0, num_tokens, samples=True)], [Chunk(request, num_tokens, 1, samples=True)]]


def _card_variants(runner: Runner, model: int) -> list[list[Chunk]]:
    num_tokens = _short(runner, model)
    steps = [[Chunk(dummy_request(runner, model, num_tokens), 0, num_tokens, samples=False)]]
    steps += _short_steps(runner, model)
    for size in _sizes(runner, model):
        steps.append([Chunk(dummy_request(runner, model, size), 0, size, samples=size > 1)])
    for constrained in (False, True):
        prefill = dummy_request(runner, model, 2, constrained=constrained)
        steps.append([Chunk(prefill, 0, 2, samples=True)])
        steps.append([Chunk(prefill, 2, 1, samples=True)])
    return steps


def _capture(graphs: DecodeGraphs, bucket: int, adapted: bool) -> Callable[[], None]:
    return lambda: graphs.capture(bucket, adapted)


def _step(runner: Runner, *chunks: Chunk) -> Callable[[], None]:
    return _plan(runner, StepPlan([ModelPlan(chunks[0].request.model, list(chunks))]))


def _plan(runner: Runner, plan: StepPlan) -> Callable[[], None]:
    def run() -> None:
        runner.step(plan)

    return run


@dataclass(frozen=True, slots=True)
class _Everything:
    ids: list[int]
    over: bool = False
    cut: bool = False


class _Anything:
    """Allows every id."""

    def fill(self, row: Bitmask) -> None:
        row[:] = -1

    def fill_ahead(self, rows: Bitmask, draft: Sequence[int]) -> int:
        rows[:] = -1
        return len(rows)

    def forced_ids(self) -> list[int]:
        return []

    def advance(self, drawn: Sequence[int]) -> Taken:
        return _Everything(list(drawn))
