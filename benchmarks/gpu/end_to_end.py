"""Part d: decoding and prefilling of whole models, random weights, as a share of the roofline of this very card.

Steps are launched one ahead of their ids, as the core's runner allows. Beside it, transformers (its
continuous batching too) and vLLM, where they are installed.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from aiexport_edge.engine.core.plan import PENDING_ID
from benchmarks.gpu.models import has_room, random_model, runner_of, shapes
from benchmarks.gpu.peers import run_transformers, run_vllm
from benchmarks.gpu.report import Bench
from benchmarks.gpu.sequences import Sequences
from benchmarks.gpu.timing import copy_bandwidth, matmul_rate
from benchmarks.roofline import DECODE_POINTS, PREFILL_POINTS, decode_seconds, prefill_seconds, shape_of

PART = "d"
STEPS = 64


def run(bench: Bench) -> None:
    """A row for each model, batch and context."""
    dtype = torch.bfloat16
    bandwidth, rate = copy_bandwidth(bench), matmul_rate(bench, dtype)
    for name, values in shapes(bench).items():
        bench.say(f"d: making {name}")
        _measure(bench, name, values, dtype, bandwidth, rate)
        if name == next(iter(shapes(bench))):
            _measure_deterministic(bench, name, values, dtype)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        run_transformers(bench, PART, name, values, dtype)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        run_vllm(bench, PART, name, values)


def _measure(
    bench: Bench, name: str, values: dict[str, Any], dtype: torch.dtype, bandwidth: float, rate: float
) -> None:
    shape = shape_of(values)
    decode_points = ((1, 20), (3, 40)) if bench.dry_run else DECODE_POINTS
    prefill_points = (30,) if bench.dry_run else PREFILL_POINTS
    longest = max(*(context for _, context in decode_points), *prefill_points) + 2 * STEPS
    model = random_model(values, dtype=dtype, device=bench.device, context_window=longest)
    runner = runner_of(
        bench,
        model,
        max_num_running=max(batch for batch, _ in decode_points),
        max_step_tokens=max(prefill_points),
        pool_bytes=64 << 20 if bench.dry_run else 0,
    )
    for batch, context in decode_points:
        if not has_room(runner, batch, context + 2 * STEPS):
            bench.say(f"d: {name} B{batch} {context}: the pool is too small")
            continue
        seconds = _decode_step(bench, Sequences(runner), batch, context, model.config.vocab_size)
        bound = decode_seconds(shape, batch, context, bandwidth=bandwidth)
        row = {"tokens_s": batch / seconds, "bound_tokens_s": batch / bound, "share": bound / seconds}
        bench.add(PART, f"{name} decode B{batch} {context}", row)
    for num_tokens in prefill_points:
        sequences = Sequences(runner)
        times = []
        for _ in range(2 if bench.dry_run else 6):
            request = sequences.add([i % model.config.vocab_size for i in range(num_tokens)])
            plan = sequences.plan([request])
            bench.synchronize()
            began = time.perf_counter()
            runner.step(plan)
            times.append(time.perf_counter() - began)
            sequences.end(request)
        seconds = min(times[1:])
        bound = prefill_seconds(shape, num_tokens, flops=rate)
        row = {"tokens_s": num_tokens / seconds, "bound_tokens_s": num_tokens / bound, "share": bound / seconds}
        bench.add(PART, f"{name} prefill {num_tokens}", row)


def _measure_deterministic(bench: Bench, name: str, values: dict[str, Any], dtype: torch.dtype) -> None:
    """What deterministic mode costs, at one point of the smallest model."""
    batch, context = (3, 40) if bench.dry_run else (32, 1024)
    row = {}
    for mode, deterministic in (("default", False), ("deterministic", True)):
        model = random_model(
            values,
            dtype=dtype,
            device=bench.device,
            context_window=context + 2 * STEPS,
            deterministic=deterministic,
        )
        pool_bytes = 64 << 20 if bench.dry_run else 0
        runner = runner_of(bench, model, max_num_running=batch, max_step_tokens=2 * context, pool_bytes=pool_bytes)
        seconds = _decode_step(bench, Sequences(runner), batch, context, model.config.vocab_size)
        row[f"{mode}_tokens_s"] = batch / seconds
        del runner, model  # the next one's pool takes what is free
    row["ratio"] = row["deterministic_tokens_s"] / row["default_tokens_s"]
    bench.add(PART, f"{name} deterministic decode B{batch} {context}", row)


def _decode_step(bench: Bench, sequences: Sequences, batch: int, context: int, vocabulary: int) -> float:
    """Seconds a step at about `context` tokens, the host's work included."""
    tokens = [i % vocabulary for i in range(context)]
    requests = [sequences.add(tokens, computed=context - 1) for _ in range(batch)]
    steps = 4 if bench.dry_run else STEPS
    pending = None
    for _ in range(3):
        pending = sequences.launch_ahead(requests, pending)
    bench.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        pending = sequences.launch_ahead(requests, pending)
    bench.synchronize()
    seconds = (time.perf_counter() - began) / steps
    assert pending is not None
    sequences.settle(requests, pending)
    assert all(PENDING_ID not in request.token_ids for request in requests)
    return seconds
