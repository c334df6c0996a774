"""What adapters cost on a CPU: decode steps and prefills with several adapters and without, in one run, paired.

    python -m benchmarks.cpu_adapters MODEL_DIRECTORY [--adapters 8] [--rank 16] [--streams 16] [--prompt 1500]

A step is the runner's, from plan to drawn ids; the streams have the adapters in turn, a prompt has one. Steps with and
without take turns, and what is compared is CPU time, so that what else the machine does meets both; the ratio is the
median of the pairs'. A model of real shapes: `python -m benchmarks.peers.model DIRECTORY`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiexport_edge.kernels import threads

os.environ.update(threads.ENVIRONMENT)  # before torch is loaded

import torch

from aiexport_edge.engine.core.loading import make_runner
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import AdapterRef, CoreConfig, CoreModel
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.loader import load_model
from benchmarks.cpu_decode import PAGE_SLACK, WINDOW, make_requests
from benchmarks.gpu.random_adapters import write_adapter
from benchmarks.peers.machine import commit, describe

GOAL = 1.10  # with adapters to without


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_adapters", description="Adapters on a CPU.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=1500)
    parser.add_argument("--quantize", nargs="+", default=["none", "int8"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    threads.set_num_threads(options.threads)
    document: dict[str, Any] = {"machine": describe(), "commit": commit(), "threads": options.threads, "rows": []}
    document |= {"adapters": options.adapters, "rank": options.rank, "goal": GOAL}
    for quantize in options.quantize:
        for row in _rows(options, quantize):
            document["rows"].append({"quantize": quantize} | row)
            print(json.dumps(document["rows"][-1]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _rows(options: argparse.Namespace, quantize: str) -> list[dict[str, Any]]:
    model = load_model(options.model, name="model", quantize=quantize, context_window=WINDOW)
    entry = CoreModel("model", str(options.model), "auto", WINDOW, False, "", quantize=quantize)
    most = max(options.streams)
    tokens = most * (options.context + PAGE_SLACK) + options.prompt + PAGE_SLACK
    pool_bytes = tokens * model.config.kv_bytes_per_token(model.dtype.itemsize)
    config = CoreConfig([entry], "cpu", 0, pool_bytes, most, 512, options.threads, 0.0, adapter_slots=options.adapters)
    runner = make_runner(config, [model], torch.device("cpu"), None)
    with tempfile.TemporaryDirectory() as directory:
        adapters = [
            write_adapter(Path(directory) / str(number), model.config, rank=options.rank, seed=number)
            for number in range(options.adapters)
        ]
        rows = []
        for streams in options.streams:
            requests = make_requests(runner, streams, options.context)
            chunks = [Chunk(request, options.context, 1, True) for request in requests]
            plans = [StepPlan([ModelPlan(0, chunks)])]
            rows.append({"streams": streams, **_pairs(runner, plans, requests, adapters, options.repeats)})
        (prompt,) = make_requests(runner, 1, options.prompt)
        size = runner.max_step_tokens
        starts = range(0, options.prompt, size)
        parts = [Chunk(prompt, at, min(size, options.prompt - at), at + size >= options.prompt) for at in starts]
        plans = [StepPlan([ModelPlan(0, [part])]) for part in parts]
        rows.append(
            {"prompt": options.prompt, **_pairs(runner, plans, [prompt], adapters, max(3, options.repeats // 6))}
        )
    return rows


def _pairs(
    runner: Runner, plans: Sequence[StepPlan], requests: Sequence[Request], adapters: Sequence[AdapterRef], repeats: int
) -> dict[str, Any]:
    def run(*, adapted: bool) -> float:
        for number, request in enumerate(requests):
            slot = number % len(adapters)
            request.adapter, request.adapter_slot = (adapters[slot], slot) if adapted else (None, -1)
        return _cpu_ms(lambda: [runner.step(plan) for plan in plans])

    for adapted in (True, False, True):
        run(adapted=adapted)
    pairs = [(run(adapted=False), run(adapted=True)) for _ in range(repeats)]
    base, adapted_ms = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(with_them / without for without, with_them in pairs)
    return {
        "base_cpu_ms": round(base, 2),
        "adapted_cpu_ms": round(adapted_ms, 2),
        "ratio": round(ratio, 3),
        "met": ratio <= GOAL,
    }


def _cpu_ms(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return 1e3 * (time.process_time() - started)


if __name__ == "__main__":
    sys.exit(main())
