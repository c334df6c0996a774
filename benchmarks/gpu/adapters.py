"""Part l: low-rank adapters: the kernels against their reference, and what they cost a model's decode step."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aiexport_edge.engine.core.protocol import AdapterRef
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.kernels.linear import PackedLinear
from aiexport_edge.kernels.lora import NO_ADAPTER, LoraTable, add_lora, add_lora_reference
from benchmarks.gpu.models import random_model, runner_of, shapes
from benchmarks.gpu.random_adapters import write_adapter
from benchmarks.gpu.report import Bench
from benchmarks.gpu.sequences import Sequences
from benchmarks.gpu.timing import seconds_of

PART = "l"
DTYPE = torch.bfloat16
NUM_ADAPTERS, RANK = 8, 16
GOAL = 1.10  # a step with adapters to one without
ROUNDING = 2**-6  # of a sum that is rounded between its two products, and once more


def run(bench: Bench) -> None:
    """Rows for kernels (µs beside the product that they add to) and for whole decode steps (the ratio)."""
    hidden, parts = (64, (64, 32, 32)) if bench.dry_run else (4096, (4096, 1024, 1024))
    for rank in (8,) if bench.dry_run else (16, 64):
        for num_tokens in (2, 40) if bench.dry_run else (1, 8, 32, 256, 2048):
            _kernels(bench, hidden, parts, rank, num_tokens)
    name, values = list(shapes(bench).items())[-1]
    for batch, context in [(2, 40)] if bench.dry_run else [(8, 1024), (32, 1024)]:
        _steps(bench, name, values, batch, context)


def _kernels(bench: Bench, hidden: int, parts: tuple[int, ...], rank: int, num_tokens: int) -> None:
    table = LoraTable.empty(
        num_slots=NUM_ADAPTERS,
        max_rank=rank,
        in_features=hidden,
        part_sizes=parts,
        dtype=DTYPE,
        device=bench.device,
    )
    for slot in range(NUM_ADAPTERS):
        table.put(slot, [(_random(bench, rank, hidden) / hidden**0.5, _random(bench, n, rank)) for n in parts])
    slots = torch.arange(num_tokens, device=bench.device, dtype=torch.int32) * NUM_ADAPTERS // num_tokens
    slots[num_tokens // 2] = NO_ADAPTER
    x, out = _random(bench, num_tokens, hidden), _random(bench, num_tokens, sum(parts))
    expected = out.float()
    add_lora_reference(expected, x, slots, table)
    actual = out.clone()
    add_lora(actual, x, slots, table)
    deviation = float(((actual.float() - expected).abs() / (expected.abs() + expected.square().mean().sqrt())).max())
    product = PackedLinear(_random(bench, sum(parts), hidden), dtype=DTYPE, deterministic=False)
    row = {
        "us": seconds_of(bench, partial(add_lora, actual, x, slots, table)) * 1e6,
        "product_us": seconds_of(bench, partial(product, x)) * 1e6,
        "deviation": deviation,
        "ok": deviation <= ROUNDING,
    }
    bench.add(PART, f"add_lora rank {rank}, {num_tokens} tokens", row)


def _steps(bench: Bench, name: str, values: dict[str, object], batch: int, context: int) -> None:
    """The same decode step with NUM_ADAPTERS adapters on every product, and without."""
    model = random_model(values, dtype=DTYPE, device=bench.device, context_window=context + 200)
    with tempfile.TemporaryDirectory() as directory:
        adapters = [
            write_adapter(Path(directory) / str(number), model.config, rank=RANK, seed=number)
            for number in range(NUM_ADAPTERS)
        ]
        runner = runner_of(
            bench,
            model,
            max_num_running=batch,
            max_step_tokens=2 * context,
            pool_bytes=64 << 20 if bench.dry_run else 0,
            adapter_slots=NUM_ADAPTERS,
            max_adapter_rank=RANK,
        )
        vocabulary = model.config.vocab_size
        base = _decode_seconds(bench, runner, [], batch, context, vocabulary)
        adapted = _decode_seconds(bench, runner, adapters, batch, context, vocabulary)
    row = {
        "base_ms": base * 1e3,
        "adapted_ms": adapted * 1e3,
        "ratio": adapted / base,
        "met": adapted / base <= GOAL,
    }
    bench.add(PART, f"{name} decode B{batch} {context}, {NUM_ADAPTERS} adapters of rank {RANK}", row)


def _decode_seconds(
    bench: Bench, runner: Runner, adapters: list[AdapterRef], batch: int, context: int, vocabulary: int
) -> float:
    """A step at about `context` tokens, each request with one of `adapters` in turn."""
    sequences = Sequences(runner)
    tokens = [i % vocabulary for i in range(context)]
    requests = [sequences.add(tokens, computed=context - 1) for _ in range(batch)]
    for number, request in enumerate(requests if adapters else []):
        slot = number % len(adapters)
        request.adapter, request.adapter_slot = adapters[slot], slot
    pending = None
    steps = 4 if bench.dry_run else 48
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
    for request in requests:
        sequences.end(request)
    return seconds


def _random(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device).to(DTYPE)
