"""Part h: a mixture's experts, beside a loop of dense products and what the card's memory or its tensor cores allow."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from aiexport_edge.engine.models.memory import PRODUCT_BYTES
from aiexport_edge.kernels.linear import round_for_card
from aiexport_edge.kernels.moe import Experts, moe_mlp_reference, route
from benchmarks.gpu.report import Bench
from benchmarks.gpu.timing import copy_bandwidth, matmul_rate, seconds_of

PART = "h"
DTYPE = torch.bfloat16
# hidden, of an expert, experts, experts a token
SHAPES = {"30B-A3B": (2048, 768, 128, 8), "235B-A22B": (4096, 1536, 128, 8)}
TINY = {"tiny": (64, 32, 8, 2)}
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)


def run(bench: Bench) -> None:
    """A row for each shape and number of tokens: microseconds, the share of the bound, the loop's microseconds.

    The bound is the slower of reading the chosen experts' weights (and the activations) once at the copy's bandwidth,
    and multiplying at the rate of a large product. `ok`: the numbers are the reference's.
    """
    bandwidth, rate = copy_bandwidth(bench), matmul_rate(bench, DTYPE)
    for name, (hidden, inner, num_experts, top_k) in (TINY if bench.dry_run else SHAPES).items():
        gate_up = _weights(bench, num_experts, 2 * inner, hidden)
        down = _weights(bench, num_experts, hidden, inner)
        pairs = [([up], out) for up, out in zip(gate_up, down, strict=True)]
        layer = Experts(pairs, dtype=DTYPE, deterministic=False)
        for num_tokens in TOKENS[:5] if bench.dry_run else TOKENS:
            x = torch.randn(num_tokens, hidden, device=bench.device).to(DTYPE)
            logits = torch.randn(num_tokens, num_experts, device=bench.device)
            weights, experts = route(logits, top_k, normalize=True)
            touched = len(torch.unique(experts))
            num_bytes = touched * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes
            operations = 2 * num_tokens * top_k * 3 * hidden * inner
            seconds = seconds_of(bench, partial(layer, x, weights, experts))
            loop = seconds_of(bench, partial(_loop, x, weights, experts, gate_up, down), repeats=5)
            routing = seconds_of(bench, partial(route, logits, top_k, normalize=True))
            row = {
                "experts": touched,
                "us": seconds * 1e6,
                "share": max(num_bytes / bandwidth, operations / rate) / seconds,
                "loop_us": loop * 1e6,
                "loop_per_ours": loop / seconds,
                "route_us": routing * 1e6,
            }
            if num_tokens <= 64:
                row["deviation"] = _deviation(layer, x, weights, experts, gate_up, down)
            bench.add(PART, f"{name} {num_tokens} tokens", row | {"ok": row.get("deviation", 0.0) < 0.05})
        for quantize in ("int4", "fp8"):
            _quantized(bench, f"{name} {quantize}", quantize, gate_up, down, top_k, bandwidth, layer)


def _quantized(
    bench: Bench, name: str, quantize: str, gate_up: Tensor, down: Tensor, top_k: int, bandwidth: float, wide: Experts
) -> None:
    """The same experts rounded: beside reading their own bits once, and beside the layer `wide` in bfloat16."""
    num_experts, hidden, _ = down.shape
    parts = [[round_for_card(weight, quantize) for weight in of] for of in (gate_up, down)]
    pairs = [([up], out) for up, out in zip(*parts, strict=True)]
    layer = Experts(pairs, dtype=DTYPE, deterministic=False)
    rounded = [torch.stack([weight.dequantize(DTYPE) for weight in of]) for of in parts]
    del parts, pairs
    expert_bytes = PRODUCT_BYTES[quantize] * (gate_up[0].numel() + down[0].numel())
    for num_tokens in TOKENS[:5] if bench.dry_run else TOKENS:
        x = torch.randn(num_tokens, hidden, device=bench.device).to(DTYPE)
        weights, experts = route(torch.randn(num_tokens, num_experts, device=bench.device), top_k, normalize=True)
        touched = len(torch.unique(experts))
        seconds = seconds_of(bench, partial(layer, x, weights, experts))
        in_bfloat16 = seconds_of(bench, partial(wide, x, weights, experts))
        row = {
            "experts": touched,
            "us": seconds * 1e6,
            "share": (touched * expert_bytes + 2 * x.nbytes) / bandwidth / seconds,
            "times_bfloat16": in_bfloat16 / seconds,
        }
        if num_tokens <= 64:
            row["deviation"] = _deviation(layer, x, weights, experts, *rounded)
        bench.add(PART, f"{name} {num_tokens} tokens", row | {"ok": row.get("deviation", 0.0) < 0.05})


def _weights(bench: Bench, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=bench.device).normal_(std=shape[-1] ** -0.5)


def _loop(x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Dense products, one expert after the other, as the models' own code has it. The host waits for the choices."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in torch.unique(experts).tolist():
        tokens, chosen = torch.where(experts == expert)
        gate, up = linear(x[tokens], gate_up[expert]).chunk(2, dim=-1)
        inner = linear(silu(gate) * up, down[expert])
        out.index_add_(0, tokens, inner.float() * weights[tokens, chosen, None])
    return out.to(x.dtype)


def _deviation(layer: Experts, x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor) -> float:
    """From the reference, by the largest number of its result."""
    wanted = moe_mlp_reference(x, weights, experts, gate_up, down).float()
    return float((layer(x, weights, experts).float() - wanted).abs().max() / wanted.abs().max())
