"""The launches of a server: every kernel in the shapes of the model families, from tensors without memory.

What `aot` compiles. Each is built by the launcher that serves, for a given architecture, so launch settings are those
that would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from aiexport_edge.kernels.gpu import (
    decode_attention,
    fp8_linear,
    gather,
    lora,
    moe,
    packed_linear,
    packed_moe,
    paged_attention,
    qk_norm_rope,
    rms_norm,
    sampler,
    shared_prefix_attention,
    swiglu,
)
from aiexport_edge.kernels.gpu.launch import Architecture, Launch
from aiexport_edge.kernels.lora import LoraTable

MAX_CONTEXT = 32768
SCALE = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """A launch to compile. `may_spill`: registers kept in memory are reported, not refused. `wide`: reads 16 bytes."""

    kernel: str
    detail: str
    launch: Launch
    may_spill: bool = False
    wide: bool = True


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernels see of a model."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocabulary: int
    tokens_per_page: int
    rot_dim: int
    normed: bool = True
    mrope_section: tuple[int, int, int] | None = None
    sliding_window: int = 0


QWEN3_8B = Shape("qwen3-8b", 32, 8, 128, 4096, 12288, 151936, 18, 128)
REPRESENTATIVE = (
    QWEN3_8B,
    Shape("heads-of-80", 32, 32, 80, 2560, 6912, 51200, 7, 32, normed=False),
)
SHAPES = (
    *REPRESENTATIVE,
    Shape("qwen3-0.6b", 16, 8, 128, 1024, 3072, 151936, 16, 128),
    Shape("qwen3-30b-a3b", 32, 4, 128, 2048, 768, 151936, 28, 128),
    Shape("qwen3-vl-32b", 64, 8, 128, 5120, 25600, 151936, 36, 128, mrope_section=(24, 20, 20)),
    Shape("llama-3.2-1b", 32, 8, 64, 2048, 8192, 128256, 16, 64, normed=False),
    Shape("mistral-7b", 32, 8, 128, 4096, 14336, 32768, 16, 128, normed=False, sliding_window=4096),
    Shape("heads-of-96", 32, 32, 96, 3072, 8192, 32064, 16, 96, normed=False),
    Shape("heads-of-256", 16, 8, 256, 3840, 15360, 262144, 16, 256),
    Shape("one-kv-head", 32, 1, 128, 4096, 16384, 32000, 16, 128, normed=False),
)
# What the demonstration models of other projects have: fewer dimensions than the matrix units multiply.
STORIES = Shape("heads-of-8", 8, 4, 8, 64, 172, 512, 16, 8, normed=False)


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _caches(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of a page pool, with strides as large as they get."""
    memory = _meta(20000, 36, 2, shape.num_kv_heads, shape.tokens_per_page, shape.head_dim, dtype=dtype)
    return memory[:, 1, 0], memory[:, 1, 1]


def attention_cases(
    architecture: Architecture, shape: Shape, dtype: torch.dtype, *, fp8: bool = False, batches: tuple[int, ...] = (32,)
) -> Iterator[Case]:
    """Rotation with KV write, decode, prefill and shared-prefix attention; FP8 caches where asked."""
    detail = f"{shape.name} {str(dtype).removeprefix('torch.')}{' fp8 cache' if fp8 else ''}"
    k_cache, v_cache = _caches(shape, torch.uint8 if fp8 else dtype)
    kv_scale = _meta(shape.num_kv_heads, dtype=torch.float32) if fp8 else None
    weight = _meta(shape.head_dim, dtype=dtype) if shape.normed else None
    heads = shape.num_q_heads + 2 * shape.num_kv_heads
    for num_tokens in (16, 4096):
        launch, _ = qk_norm_rope.qk_norm_rope_launch(
            _meta(num_tokens, heads * shape.head_dim, dtype=dtype),
            _meta(MAX_CONTEXT, shape.rot_dim, dtype=torch.float32),
            _meta(3, num_tokens, dtype=torch.int64),
            _meta(num_tokens, dtype=torch.int64),
            k_cache,
            v_cache,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            q_weight=weight,
            k_weight=weight,
            mrope_section=shape.mrope_section,
            k_scale=kv_scale,
            v_scale=kv_scale,
        )
        yield Case("qk_norm_rope", f"{detail}, {num_tokens} tokens", launch)
    columns = -(-MAX_CONTEXT // shape.tokens_per_page)
    for batch in batches:
        q = _meta(batch, shape.num_q_heads, shape.head_dim, dtype=dtype)
        tables, seq_lens = _meta(batch, columns, dtype=torch.int32), _meta(batch, dtype=torch.int32)
        launches, _ = decode_attention.decode_attention_launches(
            q,
            k_cache,
            v_cache,
            tables,
            seq_lens,
            scale=SCALE,
            sliding_window=shape.sliding_window,
            architecture=architecture,
            k_scale=kv_scale,
            v_scale=kv_scale,
        )
        for name, launch in zip(("plan_splits", "decode_attention", "merge_states"), launches, strict=True):
            yield Case(name, f"{detail}, batch {batch}", launch, wide=name != "plan_splits")
    if not shape.sliding_window:
        launches, _ = shared_prefix_attention.shared_prefix_attention_launches(
            q,
            k_cache,
            v_cache,
            tables,
            seq_lens,
            _meta(9, dtype=torch.int32),
            _meta(8, dtype=torch.int32),
            scale=SCALE,
            architecture=architecture,
            k_scale=kv_scale,
            v_scale=kv_scale,
        )
        names = ("plan_prefixes", "plan_splits", "shared_prefix", "decode_attention", "merge_states")
        for name, launch in zip(names, launches, strict=True):
            yield Case(
                name, f"{detail}, 8 groups", launch, may_spill=name == "shared_prefix", wide=not name.startswith("plan")
            )
    for num_tokens, sequences in ((8192, 2), (96, 4)):
        launch, _ = paged_attention.paged_attention_launch(
            _meta(num_tokens, shape.num_q_heads, shape.head_dim, dtype=dtype),
            k_cache,
            v_cache,
            _meta(sequences, columns, dtype=torch.int32),
            _meta(sequences + 1, dtype=torch.int32),
            _meta(sequences, dtype=torch.int32),
            scale=SCALE,
            sliding_window=shape.sliding_window,
            architecture=architecture,
            k_scale=kv_scale,
            v_scale=kv_scale,
        )
        yield Case("prefill_attention", f"{detail}, {num_tokens} tokens", launch, may_spill=True)


def deterministic_cases(architecture: Architecture, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """What differs in deterministic mode: one setting of attention for prefills and decodes, and rotation."""
    detail = f"{shape.name} {str(dtype).removeprefix('torch.')}, deterministic"
    k_cache, v_cache = _caches(shape, dtype)
    heads = shape.num_q_heads + 2 * shape.num_kv_heads
    launch, q = qk_norm_rope.qk_norm_rope_launch(
        _meta(16, heads * shape.head_dim, dtype=dtype),
        _meta(MAX_CONTEXT, shape.rot_dim, dtype=torch.float32),
        _meta(3, 16, dtype=torch.int64),
        _meta(16, dtype=torch.int64),
        k_cache,
        v_cache,
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        mrope_section=shape.mrope_section,
        batch_invariant=True,
    )
    yield Case("qk_norm_rope", detail, launch)
    launch, _ = paged_attention.paged_attention_launch(
        q,
        k_cache,
        v_cache,
        _meta(16, -(-MAX_CONTEXT // shape.tokens_per_page), dtype=torch.int32),
        _meta(17, dtype=torch.int32),
        _meta(16, dtype=torch.int32),
        scale=SCALE,
        sliding_window=shape.sliding_window,
        batch_invariant=True,
        architecture=architecture,
    )
    yield Case("prefill_attention", detail, launch, may_spill=True)


def row_cases(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Norms, SwiGLU and row gathering."""
    detail = f"{shape.name} {str(dtype).removeprefix('torch.')}"
    x, weight = _meta(64, shape.hidden_size, dtype=dtype), _meta(shape.hidden_size, dtype=dtype)
    yield Case("rms_norm", detail, rms_norm.rms_norm_launch(x, weight, 1e-6)[0])
    yield Case("add_rms_norm", detail, rms_norm.add_rms_norm_launch(x, x, weight, 1e-6)[0])
    for code in (torch.float8_e4m3fn, torch.int8):
        launch = rms_norm.add_rms_norm_quantized_launch(x, x, weight, 1e-6, code)[0]
        yield Case("add_rms_norm", f"{detail} to {str(code).removeprefix('torch.')}", launch)
    yield Case("swiglu", detail, swiglu.swiglu_launch(_meta(64, 2 * shape.intermediate_size, dtype=dtype))[0])
    yield Case("gather_rows", detail, gather.gather_rows_launch(x, _meta(8, dtype=torch.int64))[0])


def sampler_cases(
    architecture: Architecture, shape: Shape, *, masked: bool, batches: tuple[int, ...] = (64,)
) -> Iterator[Case]:
    """The sampler's four launches, with a grammar's bitmask or without."""
    for batch in batches:
        words = -(-shape.vocabulary // 32)
        launches, _, _ = sampler.sample_launches(
            _meta(batch, shape.vocabulary, dtype=torch.float32),
            _meta(batch, dtype=torch.float32),
            _meta(batch, dtype=torch.int32),
            _meta(batch, dtype=torch.float32),
            _meta(batch, dtype=torch.int64),
            _meta(batch, dtype=torch.int64),
            bitmask=_meta(batch, words, dtype=torch.int32) if masked else None,
            architecture=architecture,
        )
        for name, launch in zip(("highest", "race", "collect", "draw"), launches, strict=True):
            detail = f"{shape.name} batch {batch}{', grammar' if masked else ''}"
            yield Case(f"sampler {name}", detail, launch, wide=False)


def moe_cases(architecture: Architecture, dtype: torch.dtype, *, num_tokens: tuple[int, ...]) -> Iterator[Case]:
    """Qwen3-30B-A3B's routing and experts, for few tokens and for many."""
    hidden, size, num_experts, top_k = 2048, 768, 128, 8
    detail = f"qwen3-30b-a3b {str(dtype).removeprefix('torch.')}"
    few = ("moe gate_up few", "moe down few")
    many = ("moe rank", "moe lay out", "moe scatter", "moe gate_up", "moe down", "moe sum")
    yield Case(
        "moe route", detail, moe.route_launch(_meta(64, num_experts, dtype=dtype), top_k, normalize=True)[0], wide=False
    )
    for count in num_tokens:
        launches, _ = moe.moe_mlp_launches(
            _meta(count, hidden, dtype=dtype),
            _meta(count, top_k, dtype=torch.float32),
            _meta(count, top_k, dtype=torch.int32),
            _meta(num_experts, 2 * size, hidden, dtype=dtype),
            _meta(num_experts, hidden, size, dtype=dtype),
            architecture=architecture,
        )
        for name, launch in zip(few if count <= moe.FEW_TOKENS else many, launches, strict=True):
            yield Case(name, f"{detail}, {count} tokens", launch, wide=name not in many[:3])


def lora_cases(shape: Shape, dtype: torch.dtype, *, num_tokens: tuple[int, ...]) -> Iterator[Case]:
    """Adapters of rank 64 on a product of one part and on one of three."""
    detail = f"{shape.name} {str(dtype).removeprefix('torch.')}"
    heads = [shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads]
    for part_sizes in ([shape.hidden_size], [num_heads * shape.head_dim for num_heads in heads]):
        table = LoraTable.empty(
            num_slots=8,
            max_rank=64,
            in_features=shape.hidden_size,
            part_sizes=part_sizes,
            dtype=dtype,
            device=torch.device("meta"),
        )
        for count in num_tokens:
            launches = lora.add_lora_launches(
                _meta(count, sum(part_sizes), dtype=dtype),
                _meta(count, shape.hidden_size, dtype=dtype),
                _meta(count, dtype=torch.int32),
                table,
            )
            for name, launch in zip(("lora shrink", "lora expand"), launches, strict=True):
                yield Case(name, f"{detail}, {count} tokens, {len(part_sizes)} parts", launch)


def _card_weight(kind: int, shape: tuple[int, int], group: int) -> packed_linear.CardWeight:
    """A weight of one of the kernels' kinds; `group` 0: one scale an output."""
    num_outputs, width = shape
    half = min(packed_linear.HALF, group or packed_linear.HALF)
    group = group or width
    if kind == packed_linear.INT4:
        codes = _meta(-(-width // (2 * half)), num_outputs, half, dtype=torch.uint8)
    else:
        codes = _meta(*shape, dtype=torch.int8 if kind == packed_linear.INT8 else torch.uint8)
    groups = -(-width // group)
    zeros = _meta(groups, num_outputs, dtype=torch.uint8)
    scales = _meta(groups, num_outputs, dtype=torch.float32)
    return packed_linear.CardWeight(kind, shape, codes, scales, zeros, half, group, None)


def packed_cases(
    architecture: Architecture, shape: Shape, dtype: torch.dtype, *, num_tokens: tuple[int, ...]
) -> Iterator[Case]:
    """Products with weights of four and eight bits, and with FP8 rows where the architecture multiplies them."""
    name = f"{shape.name} {str(dtype).removeprefix('torch.')}"
    own = (shape.hidden_size + 2 * shape.num_kv_heads * shape.head_dim, shape.hidden_size)
    for kind, group, bits in (
        (packed_linear.INT4, 32, "int4/32"),
        (packed_linear.INT4, 128, "int4/128"),
        (packed_linear.INT8, 0, "int8"),
        (packed_linear.E4M3, 0, "fp8"),
        (packed_linear.E4M3, 128, "fp8/128"),
    ):
        weight = _card_weight(kind, own, group)
        for count in num_tokens:
            launches, _ = packed_linear.packed_linear_launches(
                _meta(count, shape.hidden_size, dtype=dtype), weight, None, out_dtype=dtype, architecture=architecture
            )
            for kernel, launch in zip(("packed product", "packed sum"), launches, strict=False):
                yield Case(kernel, f"{name} {bits}, {count} tokens", launch, wide=group != 32)
        yield Case("decode weight", f"{name} {bits}", packed_linear.decode_weight_launch(weight, dtype)[0], wide=False)
        if kind != packed_linear.E4M3 or architecture.capability < fp8_linear.LOWEST_CAPABILITY:
            continue
        for count in (64, 1024):
            rows = _meta(count, shape.hidden_size, dtype=dtype)
            quantize, codes, scales = fp8_linear.quantize_rows_launch(rows, fp8_linear.group_of(weight))
            yield Case("fp8 rows", f"{name} {bits}, {count} tokens", quantize, wide=False)
            product, _ = fp8_linear.fp8_linear_launch(codes, scales, weight, None, out_dtype=dtype)
            yield Case("fp8 product", f"{name} {bits}, {count} tokens", product)


def packed_moe_cases(architecture: Architecture, dtype: torch.dtype, *, num_tokens: tuple[int, ...]) -> Iterator[Case]:
    """Qwen3-30B-A3B's experts in four and eight bits."""
    hidden, size, num_experts, top_k = 2048, 768, 128, 8
    name = f"qwen3-30b-a3b {str(dtype).removeprefix('torch.')}"
    for kind, group, bits in (
        (packed_linear.INT4, 32, "int4/32"),
        (packed_linear.INT4, 128, "int4/128"),
        (packed_linear.INT8, 0, "int8"),
        (packed_linear.E4M3, 0, "fp8"),
        (packed_linear.E4M3, 128, "fp8/128"),
    ):
        packed = packed_moe.CardExperts(
            *(_stacked(_card_weight(kind, shape, group), num_experts) for shape in ((2 * size, hidden), (hidden, size)))
        )
        for count in num_tokens:
            launches, _ = packed_moe.packed_moe_launches(
                _meta(count, hidden, dtype=dtype),
                _meta(count, top_k, dtype=torch.float32),
                _meta(count, top_k, dtype=torch.int32),
                packed,
                architecture=architecture,
            )
            for kernel, launch in zip(("packed moe gate_up", "packed moe down"), launches[-3:-1], strict=True):
                yield Case(kernel, f"{name} {bits}, {count} tokens", launch, wide=group != 32)


def _stacked(weight: packed_linear.CardWeight, number: int) -> packed_linear.CardWeight:
    """So many of them, one after the other."""
    codes, scales, zeros = (
        _meta(number, *each.shape, dtype=each.dtype) for each in (weight.codes, weight.scales, weight.zeros)
    )
    return packed_linear.CardWeight(
        weight.kind, weight.shape, codes, scales, zeros, weight.half, weight.group, weight.order
    )


def representative_cases(architecture: Architecture) -> Iterator[Case]:
    """Each kernel at least once, in a minute or so for three architectures."""
    for shape in REPRESENTATIVE:
        yield from attention_cases(architecture, shape, torch.bfloat16)
    yield from deterministic_cases(architecture, QWEN3_8B, torch.bfloat16)
    yield from row_cases(QWEN3_8B, torch.bfloat16)
    yield from sampler_cases(architecture, QWEN3_8B, masked=True)
    yield from moe_cases(architecture, torch.bfloat16, num_tokens=(1, 256))
    yield from lora_cases(QWEN3_8B, torch.bfloat16, num_tokens=(1, 256))
    yield from packed_cases(architecture, QWEN3_8B, torch.bfloat16, num_tokens=(1,))
    yield from packed_moe_cases(architecture, torch.bfloat16, num_tokens=(1,))


def service_cases(architecture: Architecture) -> Iterator[Case]:
    """Every shape in bfloat16; one of them in float16, with FP8 caches and in more batch sizes, too."""
    for shape in SHAPES:
        yield from attention_cases(architecture, shape, torch.bfloat16)
        yield from deterministic_cases(architecture, shape, torch.bfloat16)
        yield from row_cases(shape, torch.bfloat16)
    for case in attention_cases(architecture, STORIES, torch.float32):
        yield replace(case, may_spill=True, wide=False)
    for dtype in (torch.bfloat16, torch.float16):
        yield from attention_cases(architecture, QWEN3_8B, dtype, batches=(1, 256))
        yield from attention_cases(architecture, QWEN3_8B, dtype, fp8=True)
    yield from row_cases(QWEN3_8B, torch.float16)
    for dtype in (torch.bfloat16, torch.float16):
        yield from lora_cases(QWEN3_8B, dtype, num_tokens=(1, 256, 2048))
        yield from packed_cases(architecture, QWEN3_8B, dtype, num_tokens=(1, 32, 64))
        yield from packed_moe_cases(architecture, dtype, num_tokens=(1, 256, 8192))
    for masked in (False, True):
        yield from sampler_cases(architecture, QWEN3_8B, masked=masked, batches=(1, 64))
        yield from moe_cases(architecture, torch.float16 if masked else torch.bfloat16, num_tokens=(1, 64, 256, 8192))
