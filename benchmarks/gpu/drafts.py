"""Part j: drafts: that they change no id, what they save where a text repeats itself, what they cost where none does.

Random weights: greedy, a model soon says the same again and again, and nearly every guess comes true; at temperature 1
nothing repeats. So the rows are the two ends between which real text lies.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from aiexport_edge.engine.core.protocol import Sampling
from aiexport_edge.engine.core.runner import Runner
from benchmarks.gpu.models import random_model, runner_of, shapes
from benchmarks.gpu.report import Bench, Value
from benchmarks.gpu.served import Served

PART = "j"
PROMPT = 200
ROUNDS = 3  # each way, in turns
LEAST_RATIO = 0.97  # of the rate without drafts, where nothing repeats


@dataclass(frozen=True, slots=True)
class _Answers:
    """What some requests answered, side by side: their ids, and steps and seconds after the first of each."""

    ids: list[list[int]]
    num_steps: int
    seconds: float
    num_guessed: int
    num_accepted: int

    @property
    def num_later(self) -> int:
        """Ids after the first of each."""
        return sum(len(ids) - 1 for ids in self.ids)

    @property
    def rate(self) -> float:
        """These a second."""
        return self.num_later / self.seconds


def run(bench: Bench) -> None:
    """Rows of equality for the smallest model, in deterministic mode; of rates for it and the largest."""
    sizes = list(shapes(bench).items())
    _compare(bench, *sizes[0])
    for name, values in dict([sizes[0], sizes[-1]]).items():
        _measure(bench, name, values)


def _runner(bench: Bench, values: dict[str, Any], streams: int, num_tokens: int, *, deterministic: bool) -> Runner:
    model = random_model(
        values,
        dtype=torch.bfloat16,
        device=bench.device,
        context_window=PROMPT + num_tokens + 1,
        deterministic=deterministic,
    )
    pool_bytes = (64 << 20) if bench.dry_run else (8 << 30)
    return runner_of(bench, model, max_num_running=streams, max_step_tokens=1024, pool_bytes=pool_bytes, drafts=True)


def _answers(
    bench: Bench, runner: Runner, streams: int, num_tokens: int, samplings: list[Sampling], *, drafts: bool
) -> _Answers:
    """`streams` requests side by side, with each of `samplings` in turn."""
    draw = random.Random(6)
    served = Served(runner, drafts=drafts)
    handles = []
    for number in range(streams):
        prompt = [draw.randrange(3, 280) for _ in range(draw.randrange(PROMPT // 4, PROMPT))]
        handles.append(served.add(prompt, max_tokens=num_tokens, sampling=samplings[number % len(samplings)]))
    served.prefill()
    bench.synchronize()
    num_steps, began = 0, time.perf_counter()
    while served.busy:
        num_steps += bool(served.advance().tokens)
    bench.synchronize()
    seconds = time.perf_counter() - began
    scheduler = served.scheduler
    counts = scheduler.num_guessed_tokens[0], scheduler.num_accepted_tokens[0]
    served.end()
    return _Answers([served.ids[handle] for handle in handles], num_steps, seconds, *counts)


def _compare(bench: Bench, name: str, values: dict[str, Any]) -> None:
    """Greedy and sampled requests side by side: the same ids with drafts and without."""
    streams, num_tokens = (3, 24) if bench.dry_run else (16, 256)
    runner = _runner(bench, values, streams, num_tokens, deterministic=True)
    samplings = [_greedy(0), Sampling(0.7, 0.9, 20, 1), _greedy(2), Sampling(1.0, 1.0, 0, 2**64 - 1)]
    without = _answers(bench, runner, streams, num_tokens, samplings, drafts=False)
    with_drafts = _answers(bench, runner, streams, num_tokens, samplings, drafts=True)
    equal = sum(one == other for one, other in zip(without.ids, with_drafts.ids, strict=True))
    row = {
        "requests": streams,
        "equal": equal,
        "guessed": with_drafts.num_guessed,
        "accepted": with_drafts.num_accepted,
        "ok": equal == streams and (bench.dry_run or with_drafts.num_accepted > 0),
    }
    bench.add(PART, f"{name} deterministic, the same ids", row)


def _measure(bench: Bench, name: str, values: dict[str, Any]) -> None:
    """Ids a step and the rate beside that without drafts."""
    points = (1, 2) if bench.dry_run else (1, 4, 16)
    num_tokens = 24 if bench.dry_run else 256
    runner = _runner(bench, values, points[-1], num_tokens, deterministic=False)
    for kind, samplings in (("repeats", [_greedy(0)]), ("repeats nothing", [Sampling(1.0, 1.0, 0, 5)])):
        for streams in points:
            _answers(bench, runner, streams, 16, samplings, drafts=True)  # graphs that are captured when first needed
            rounds = [
                [_answers(bench, runner, streams, num_tokens, samplings, drafts=drafts) for drafts in (False, True)]
                for _ in range(1 if bench.dry_run else ROUNDS)
            ]
            last = rounds[-1][1]
            ratio = statistics.median(with_drafts.rate / without.rate for without, with_drafts in rounds)
            row: dict[str, Value] = {
                "ids_per_step": last.num_later / max(last.num_steps, 1) / streams,
                "guessed": last.num_guessed,
                "accepted": last.num_accepted,
                "tokens_s": statistics.median(with_drafts.rate for _, with_drafts in rounds),
                "without_tokens_s": statistics.median(without.rate for without, _ in rounds),
                "ratio": ratio,
            }
            if kind == "repeats nothing":
                row["met"] = ratio >= LEAST_RATIO
            bench.add(PART, f"{name} {kind} x{streams}", row)


def _greedy(seed: int) -> Sampling:
    return Sampling(0.0, 1.0, 0, seed)
