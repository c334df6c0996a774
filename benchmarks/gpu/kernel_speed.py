"""Part c: kernels as a share of what the card copies or multiplies, beside what torch has for the same work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from aiexport_edge.kernels.decode_attention import decode_attention
from aiexport_edge.kernels.linear import PackedLinear
from aiexport_edge.kernels.paged_attention import paged_attention
from aiexport_edge.kernels.qk_norm_rope import qk_norm_rope
from aiexport_edge.kernels.quantization import (
    Fp8Weight,
    QuantizedWeight,
    int8_weight,
    quantize_fp8,
    quantize_int4,
)
from aiexport_edge.kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from aiexport_edge.kernels.sampler import sample
from aiexport_edge.kernels.swiglu import swiglu, swiglu_reference
from benchmarks.gpu.paged import paged
from benchmarks.gpu.report import Bench, Value
from benchmarks.gpu.timing import copy_bandwidth, matmul_rate, seconds_of

PART = "c"
DTYPE = torch.bfloat16
Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Qwen3-4B and 8B


def run(bench: Bench) -> None:
    """A row for each kernel and shape: microseconds, share of the bound, and the others' microseconds."""
    bandwidth, rate = copy_bandwidth(bench), matmul_rate(bench, DTYPE)
    bench.add(PART, "card", {"copy_TB_s": bandwidth / 1e12, "matmul_TFLOP_s": rate / 1e12})
    _elementwise(bench, bandwidth)
    _decode(bench, bandwidth)
    _prefill(bench, rate)
    _products(bench, bandwidth, rate)
    _quantized_products(bench, bandwidth)
    _sampler(bench)


def _add(bench: Bench, name: str, run: Callable[[], object], bound: float, **others: Callable[[], object]) -> None:
    """`bound`: the least seconds that the card needs. A rival that cannot run there says why."""
    seconds = seconds_of(bench, run)
    row: dict[str, Value] = {"us": seconds * 1e6, "share": bound / seconds}
    for other, rival in others.items():
        try:
            row[f"{other}_us"] = seconds_of(bench, rival) * 1e6
        except RuntimeError as error:
            row[f"{other}_us"] = None
            bench.say(f"{name}: {other} does not run here: {str(error).splitlines()[0]}")
    bench.add(PART, name, row)


def _compiled(bench: Bench, function: Callable[..., object], *arguments: object) -> dict[str, Callable[[], object]]:
    """torch.compile's version of the reference as a rival; not on a dry run, where it would call a C++ compiler."""
    if bench.dry_run:
        return {}
    compiled = torch.compile(function, dynamic=False)
    return {"torch_compile": lambda: compiled(*arguments)}


def _elementwise(bench: Bench, bandwidth: float) -> None:
    for rows, hidden in [(8, 64)] if bench.dry_run else [(1, 4096), (32, 4096), (4096, 4096)]:
        x, residual = (torch.randn(rows, hidden, device=bench.device).to(DTYPE) for _ in range(2))
        weight = torch.ones(hidden, device=bench.device, dtype=DTYPE)
        _add(
            bench,
            f"add_rms_norm {rows}x{hidden}",
            partial(add_rms_norm, x, residual, weight, 1e-6),
            4 * x.nbytes / bandwidth,
            **_compiled(bench, add_rms_norm_reference, x, residual, weight, 1e-6),
        )
        gate_up = torch.randn(rows, 6 * hidden, device=bench.device).to(DTYPE)
        _add(
            bench,
            f"swiglu {rows}x{3 * hidden}",
            partial(swiglu, gate_up),
            1.5 * gate_up.nbytes / bandwidth,
            **_compiled(bench, swiglu_reference, gate_up),
        )
        q_rows, kv_rows = Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        qkv = torch.randn(rows, q_rows + 2 * kv_rows, device=bench.device).to(DTYPE)
        pages = paged(
            [rows],
            [rows],
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            tokens_per_page=16,
            dtype=DTYPE,
            device=bench.device,
        )
        cos_sin = torch.randn(rows, HEAD_DIM, device=bench.device)
        positions = torch.arange(rows, device=bench.device)
        norm = torch.ones(HEAD_DIM, device=bench.device, dtype=DTYPE)
        _add(
            bench,
            f"qk_norm_rope {rows} tokens",
            partial(
                qk_norm_rope,
                qkv,
                cos_sin,
                positions.expand(3, -1),
                positions,
                pages.k_cache,
                pages.v_cache,
                num_q_heads=Q_HEADS,
                num_kv_heads=KV_HEADS,
                q_weight=norm,
                k_weight=norm,
            ),
            (2 * qkv.nbytes + cos_sin.nbytes) / bandwidth,
        )


def _decode(bench: Bench, bandwidth: float) -> None:
    points = [(2, 40)] if bench.dry_run else [(1, 1024), (1, 32768), (16, 8192), (32, 8192), (256, 1024)]
    for batch, context in points:
        pages = paged(
            [context] * batch,
            [1] * batch,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            tokens_per_page=16,
            dtype=DTYPE,
            device=bench.device,
        )
        q = torch.randn(batch, Q_HEADS, HEAD_DIM, device=bench.device).to(DTYPE)
        keys, values = (
            torch.randn(batch, KV_HEADS, context, HEAD_DIM, device=bench.device, dtype=DTYPE) for _ in range(2)
        )
        _add(
            bench,
            f"decode_attention B{batch} {context}",
            partial(
                decode_attention,
                q,
                pages.k_cache,
                pages.v_cache,
                pages.block_tables,
                pages.seq_lens,
                scale=HEAD_DIM**-0.5,
            ),
            (keys.nbytes + values.nbytes + 2 * q.nbytes) / bandwidth,
            sdpa=partial(scaled_dot_product_attention, q.unsqueeze(2), keys, values, enable_gqa=True),
        )


def _prefill(bench: Bench, rate: float) -> None:
    for length in [30] if bench.dry_run else [1024, 8192, 16384]:
        pages = paged(
            [length],
            [length],
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            tokens_per_page=16,
            dtype=DTYPE,
            device=bench.device,
        )
        q = torch.randn(length, Q_HEADS, HEAD_DIM, device=bench.device).to(DTYPE)
        dense = [torch.randn(1, Q_HEADS, length, HEAD_DIM, device=bench.device, dtype=DTYPE) for _ in range(3)]

        def sdpa(backend: SDPBackend, dense: list[Tensor] = dense) -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = dense
                return scaled_dot_product_attention(q, k, v, is_causal=True)

        rivals: dict[str, Callable[[], object]] = {"math": lambda: sdpa(SDPBackend.MATH)}
        if not bench.dry_run:
            rivals = {
                "flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
                "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
            }
        _add(
            bench,
            f"prefill_attention {length}",
            partial(
                paged_attention,
                q,
                pages.k_cache,
                pages.v_cache,
                pages.block_tables,
                pages.query_start_loc,
                pages.seq_lens,
                scale=HEAD_DIM**-0.5,
            ),
            2 * Q_HEADS * HEAD_DIM * length * length / rate,
            **rivals,
        )


def _products(bench: Bench, bandwidth: float, rate: float) -> None:
    """cuBLAS through `PackedLinear`: what it costs beside F.linear, and how near to the card it is."""
    rows_of = [2] if bench.dry_run else [1, 16, 32, 256, 4096]
    for out_features, in_features in [(96, 64)] if bench.dry_run else [(6144, 4096), (24576, 4096), (4096, 12288)]:
        weight = torch.randn(out_features, in_features, device=bench.device).to(DTYPE)
        product = PackedLinear(weight, dtype=DTYPE, deterministic=False)
        for rows in rows_of:
            x = torch.randn(rows, in_features, device=bench.device).to(DTYPE)
            bound = max(weight.nbytes / bandwidth, 2 * rows * weight.numel() / rate)
            name = f"linear {rows}x{in_features}x{out_features}"
            _add(bench, name, partial(product, x), bound, f_linear=partial(linear, x, weight))


def _quantized_products(bench: Bench, bandwidth: float) -> None:
    """Weights in four and eight bits beside F.linear with 16-bit ones: microseconds, and how many times faster.

    Issue's goals: four bits 2.5 times up to 16 rows, FP8 1.6 times at one.
    """
    generator = torch.Generator().manual_seed(0)
    rows_of = [2] if bench.dry_run else [1, 4, 16, 64, 256, 4096]
    for out_features, in_features in [(96, 128)] if bench.dry_run else [(6144, 4096), (24576, 4096), (4096, 12288)]:
        plain = torch.randn(out_features, in_features, generator=generator).div_(in_features**0.5)
        weight = plain.to(bench.device, DTYPE)
        per_output = quantize_fp8(weight)
        blocks = torch.full((-(-out_features // 128), -(-in_features // 128)), 0.001, device=bench.device)
        forms: dict[str, QuantizedWeight] = {
            "w4a16 group 128": quantize_int4(weight, 128),
            "w4a16 group 32": quantize_int4(weight, 32),
            "int8": int8_weight(weight),
            "fp8": per_output,
            "fp8 blocks": Fp8Weight(per_output.codes, blocks, (128, 128)),
        }
        for form, quantized in forms.items():
            for deterministic in (False, True):
                product = PackedLinear(quantized, dtype=DTYPE, deterministic=deterministic)
                for rows in rows_of[:1] if deterministic else rows_of:
                    x = torch.randn(rows, in_features, device=bench.device).to(DTYPE)
                    seconds, others = (
                        seconds_of(bench, run) for run in (partial(product, x), partial(linear, x, weight))
                    )
                    name = f"{form}{' deterministic' if deterministic else ''} {rows}x{in_features}x{out_features}"
                    bits = 0.5 if form.startswith("w4a16") else 1.0
                    row: dict[str, Value] = {
                        "us": seconds * 1e6,
                        "f_linear_us": others * 1e6,
                        "times_f_linear": others / seconds,
                        "share": bits * weight.numel() / bandwidth / seconds,
                    }
                    bench.add(PART, name, row)


def _sampler(bench: Bench) -> None:
    for batch in [2] if bench.dry_run else [1, 32, 128, 256]:
        vocabulary = 300 if bench.dry_run else 151936
        logits = torch.randn(batch, vocabulary, device=bench.device)
        for name, temperature, top_k, top_p in (("greedy", 0.0, 0, 1.0), ("plain", 1.0, 0, 1.0), ("top", 1.0, 50, 0.9)):
            arguments = (
                torch.full((batch,), temperature, device=bench.device),
                torch.full((batch,), top_k, dtype=torch.int32, device=bench.device),
                torch.full((batch,), top_p, device=bench.device),
                torch.arange(batch, device=bench.device),
                torch.zeros(batch, dtype=torch.int64, device=bench.device),
            )
            seconds = seconds_of(bench, partial(sample, logits, *arguments))
            sort = seconds_of(bench, partial(torch.sort, logits, dim=-1, descending=True))
            bench.add(PART, f"sampler {name} B{batch}", {"us": seconds * 1e6, "torch_sort_us": sort * 1e6})
