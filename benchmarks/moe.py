"""A mixture of experts on a CPU: our expert path, a loop of dense products, and the floor, in turns.

    python -m benchmarks.moe [--tokens 1 8 64 512] [--quantize none int8] [--experts 128] [--dry-run]

One layer of Qwen3-30B-A3B's shapes, random weights, a router's random choices. *Loop*: for each expert that some token
chose, `F.linear` on its tokens, as the models' own code has it. *Floor*: the packed products alone, on the same numbers
of rows of the same experts, one after the other with nothing between: what no path can go below without faster
products. Medians of processor time of one thread, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiexport_edge.kernels import threads

os.environ.update(threads.ENVIRONMENT)  # before torch is loaded

import torch
from torch.nn.functional import linear, silu

from aiexport_edge.kernels.linear import PackedLinear, supports_bf16
from aiexport_edge.kernels.moe import Experts, route
from benchmarks.peers.machine import commit, describe

SHAPE = {"hidden": 2048, "inner": 768, "experts": 128, "top_k": 8}  # of Qwen3-30B-A3B
TINY = {"hidden": 64, "inner": 32, "experts": 8, "top_k": 2}


class Layer:
    """The same random experts three times: as they are, as `Experts`, and as products that are called directly."""

    def __init__(self, shape: dict[str, int], quantize: str) -> None:
        self.shape = shape
        dtype = torch.bfloat16 if supports_bf16() else torch.float32
        hidden, inner, count = shape["hidden"], shape["inner"], shape["experts"]
        self.gate_up = torch.randn(count, 2 * inner, hidden).mul_(hidden**-0.5).to(dtype)
        self.down = torch.randn(count, hidden, inner).mul_(inner**-0.5).to(dtype)
        pairs = list(zip(self.gate_up, self.down, strict=True))
        self.ours = Experts([([up], down) for up, down in pairs], dtype=dtype, deterministic=False, quantize=quantize)
        self.products = [
            tuple(PackedLinear(weight, dtype=dtype, deterministic=False, quantize=quantize) for weight in pair)
            for pair in pairs
        ]
        self.dtype = dtype

    def loop(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """As transformers computes it."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        for expert in torch.unique(experts).tolist():
            tokens, chosen = torch.where(experts == expert)
            gate, up = linear(x[tokens], self.gate_up[expert]).chunk(2, dim=-1)
            inner = linear(silu(gate) * up, self.down[expert])
            out.index_add_(0, tokens, inner.float() * weights[tokens, chosen, None])
        return out.to(x.dtype)

    def floor(self, experts: torch.Tensor) -> Callable[[], None]:
        """The products alone."""
        counts = torch.bincount(experts.flatten(), minlength=self.shape["experts"]).tolist()
        rows = {count: torch.randn(count, self.shape["hidden"]).to(self.dtype) for count in set(counts) if count}
        inner = {count: torch.randn(count, self.shape["inner"]).to(self.dtype) for count in rows}

        def run() -> None:
            for (gate_up, down), count in zip(self.products, counts, strict=True):
                if count:
                    gate_up(rows[count])
                    down(inner[count], out_dtype=torch.float32)

        return run


def measure(layer: Layer, num_tokens: int, repeats: int) -> dict[str, Any]:
    """A row."""
    x = torch.randn(num_tokens, layer.shape["hidden"]).to(layer.dtype)
    logits = torch.randn(num_tokens, layer.shape["experts"])
    weights, experts = route(logits, layer.shape["top_k"], normalize=True)
    floor = layer.floor(experts)
    runs: Sequence[Callable[[], object]] = (
        lambda: layer.ours(x, weights, experts),
        lambda: layer.loop(x, weights, experts),
        floor,
    )
    for run in runs:
        run()
    times = [[_seconds(run) for run in runs] for _ in range(repeats)]
    ours, loop, least = (statistics.median(column) for column in zip(*times, strict=True))
    touched = len(torch.unique(experts))
    num_weights = touched * 3 * layer.shape["hidden"] * layer.shape["inner"]
    return {
        "tokens": num_tokens,
        "experts_touched": touched,
        "ours_ms": round(1e3 * ours, 3),
        "loop_ms": round(1e3 * loop, 3),
        "floor_ms": round(1e3 * least, 3),
        "ours_per_floor": round(statistics.median(row[0] / row[2] for row in times), 3),
        "loop_per_ours": round(statistics.median(row[1] / row[0] for row in times), 3),
        "weights_giga_per_s": round(num_weights / ours / 1e9, 2),
    }


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.moe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--quantize", nargs="+", default=["none", "int8"])
    parser.add_argument("--experts", type=int, default=SHAPE["experts"], help="of the layer; fewer take less memory")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes: that the program itself works")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    shape = TINY if options.dry_run else SHAPE | {"experts": options.experts}
    threads.set_num_threads(1)
    torch.manual_seed(0)
    document: dict[str, Any] = {"machine": describe(), "commit": commit(), "shape": shape, "threads": 1, "rows": []}
    document["load_average"] = [round(value, 2) for value in os.getloadavg()]
    with torch.inference_mode():
        for quantize in options.quantize:
            layer = Layer(shape, quantize)
            document["dtype"] = str(layer.dtype).removeprefix("torch.")
            for num_tokens in options.tokens:
                row = {"quantize": quantize} | measure(layer, num_tokens, 2 if options.dry_run else options.repeats)
                document["rows"].append(row)
                print(json.dumps(row), flush=True)
            del layer
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
