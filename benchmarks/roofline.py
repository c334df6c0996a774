"""What a card can do at best on a model: `python -m benchmarks.roofline CONFIG.json [--bandwidth 4.3] [--tflops 790]`.

Decoding is bound by memory, t = (weights + batch * context * KV bytes a token) / bandwidth: every weight that is
multiplied and every key and value is read once a step. Prefilling is bound by products: 2 operations a weight and
token, and attention's 4 * query heads * head dim for each pair of a token and one that it sees.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DECODE_POINTS = ((1, 1024), (1, 8192), (32, 1024), (32, 8192), (256, 1024))
PREFILL_POINTS = (1024, 8192)
HEAD_BYTES = 2
H200_BANDWIDTH, H200_TFLOPS = 4.3e12, 790e12  # measured: device copy, bf16 product


@dataclass(frozen=True, slots=True)
class Shape:
    """What the bounds depend on. Parameters are counts; `head` is the matrix of the logits.

    `dense` are those of all layers that every token is multiplied with; `expert` those of one expert in all layers.
    """

    dense: int
    expert: int
    num_experts: int
    experts_per_token: int
    head: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The shape that a Hugging Face config.json describes; norms and biases, a millionth of it, are left out."""
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, dict) else config
    hidden, layers = values["hidden_size"], values["num_hidden_layers"]
    q_heads = values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or q_heads
    head_dim = values.get("head_dim") or hidden // q_heads
    attention = hidden * head_dim * (2 * q_heads + 2 * kv_heads)
    num_experts = values.get("num_experts") or values.get("num_local_experts") or 0
    if num_experts:
        inner = values.get("moe_intermediate_size") or values["intermediate_size"]
        dense, expert = attention + hidden * num_experts, 3 * hidden * inner
    else:
        dense, expert = attention + 3 * hidden * values["intermediate_size"], 0
    return Shape(
        dense=layers * dense,
        expert=layers * expert,
        num_experts=num_experts,
        experts_per_token=values.get("num_experts_per_tok") or 0,
        head=hidden * values["vocab_size"],
        num_layers=layers,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


def kv_bytes_per_token(shape: Shape, kv_bytes: float) -> float:
    """Bytes that one token's keys and values of all layers take."""
    return shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * kv_bytes


def decode_weight_bytes(shape: Shape, batch: int, weight_bytes: float) -> float:
    """Bytes of weights read in a step: of experts, as many as `batch` independent even choices can be expected to hit.

    The input embedding is a row per token: nothing. The head keeps 16 bits where the layers are quantized.
    """
    experts = 0.0
    if shape.num_experts:
        missed = (1 - shape.experts_per_token / shape.num_experts) ** batch
        experts = shape.num_experts * (1 - missed) * shape.expert
    return (shape.dense + experts) * weight_bytes + shape.head * max(weight_bytes, HEAD_BYTES)


def decode_seconds(
    shape: Shape, batch: int, context: int, *, bandwidth: float, weight_bytes: float = 2, kv_bytes: float = 2
) -> float:
    """The least time of a step in which `batch` sequences of `context` tokens get one more each. Bytes/s in."""
    read = decode_weight_bytes(shape, batch, weight_bytes) + batch * context * kv_bytes_per_token(shape, kv_bytes)
    return read / bandwidth


def prefill_seconds(shape: Shape, num_tokens: int, *, flops: float) -> float:
    """The least time of a prompt of `num_tokens`, operations/s in; the head is multiplied for its last token only."""
    weights = shape.dense + shape.experts_per_token * shape.expert
    pairs = num_tokens * num_tokens / 2
    attention = 4 * shape.num_layers * shape.num_q_heads * shape.head_dim * pairs
    return (2 * weights * num_tokens + attention) / flops


def main() -> None:
    """Print both bounds of each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", help="config.json files, or directories that hold one")
    parser.add_argument("--bandwidth", type=float, default=H200_BANDWIDTH / 1e12, help="TB/s (default: an H200's)")
    parser.add_argument("--tflops", type=float, default=H200_TFLOPS / 1e12, help="TFLOP/s (default: an H200's, bf16)")
    parser.add_argument("--weight-bytes", type=float, default=2, help="bytes a weight (1 for FP8, 0.5 for W4)")
    parser.add_argument("--kv-bytes", type=float, default=2, help="bytes an element of keys and values")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    arguments = parser.parse_args()
    rows = {}
    for path in arguments.configs:
        file = path / "config.json" if path.is_dir() else path
        shape = shape_of(json.loads(file.read_bytes()))
        row = {}
        for batch, context in DECODE_POINTS:
            seconds = decode_seconds(
                shape,
                batch,
                context,
                bandwidth=arguments.bandwidth * 1e12,
                weight_bytes=arguments.weight_bytes,
                kv_bytes=arguments.kv_bytes,
            )
            row[f"decode B{batch} {context // 1024}k"] = batch / seconds
        for tokens in PREFILL_POINTS:
            row[f"prefill {tokens // 1024}k"] = tokens / prefill_seconds(shape, tokens, flops=arguments.tflops * 1e12)
        rows[str(path)] = row
    if arguments.json:
        print(json.dumps(rows))
        return
    for name, row in rows.items():
        print(f"{name} (tokens/s at {arguments.bandwidth} TB/s, {arguments.tflops} TFLOP/s)")
        for point, speed in row.items():
            print(f"  {point:<16} {speed:>12,.0f}")


if __name__ == "__main__":
    main()
