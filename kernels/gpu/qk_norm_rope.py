"""QK norm, rotary embedding and KV write on a GPU, in one pass over the QKV product.

What it computes is in `aiexport_edge.kernels.qk_norm_rope`. A program takes a few heads of one kind (q, k or v) of one
token. Caches may hold FP8 (E4M3) as bytes, each KV head with its own scale: value = code * scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.elementwise import encode_e4m3, num_warps_for
from aiexport_edge.kernels.gpu.launch import Launch, ceil_div, next_power_of_2

ELEMENTS_PER_PROGRAM = 1024


@triton.jit
def _store_heads(pointers, values, inside, scale, QUANTIZED: tl.constexpr):
    """Write float32 values in the pointers' type, or as E4M3 codes of values / scale."""
    if QUANTIZED:
        tl.store(pointers, encode_e4m3(tl.div_rn(values, scale)), mask=inside)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_and_store(
    source,
    target,
    target_head_stride,
    weight,
    eps,
    cos,
    sin,
    heads,
    head_inside,
    scale,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Heads [N, D] at `source`, normed and rotated, to `target`. cos, sin [1, BLOCK_HALF]; scale [N, 1]."""
    REST: tl.constexpr = D - 2 * HALF
    half = tl.arange(0, BLOCK_HALF)[None, :]
    half_inside = head_inside & (half < HALF)
    rows = source + heads * D
    first = tl.load(rows + half, mask=half_inside, other=0.0).to(tl.float32)
    second = tl.load(rows + HALF + half, mask=half_inside, other=0.0).to(tl.float32)
    if REST > 0:
        rest = tl.arange(0, BLOCK_REST)[None, :]
        rest_inside = head_inside & (rest < REST)
        others = tl.load(rows + 2 * HALF + rest, mask=rest_inside, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        squares = tl.sum(first * first + second * second, axis=1)
        if REST > 0:
            squares += tl.sum(others * others, axis=1)
        norm = tl.rsqrt(squares / D + eps)[:, None]
        first = first * norm * tl.load(weight + half, mask=half < HALF, other=0.0).to(tl.float32)
        second = second * norm * tl.load(weight + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
        if REST > 0:
            others = others * norm * tl.load(weight + 2 * HALF + rest, mask=rest < REST, other=0.0).to(tl.float32)
    targets = target + heads * target_head_stride
    _store_heads(targets + half, first * cos - second * sin, half_inside, scale, QUANTIZED)
    _store_heads(targets + HALF + half, second * cos + first * sin, half_inside, scale, QUANTIZED)
    if REST > 0:
        _store_heads(targets + 2 * HALF + rest, others, rest_inside, scale, QUANTIZED)


@triton.jit(do_not_specialize=["positions_stride"], do_not_specialize_on_alignment=["positions", "slots"])
def _qk_norm_rope(
    qkv,
    cos_sin,
    positions,
    slots,
    q_weight,
    k_weight,
    k_scale,
    v_scale,
    q_out,
    k_cache,
    v_cache,
    qkv_stride,
    positions_stride,
    eps,
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    TOKENS_PER_PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEIGHT_END: tl.constexpr,
    WIDTH_END: tl.constexpr,
    HAS_Q_WEIGHT: tl.constexpr,
    HAS_K_WEIGHT: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Frequency i < HEIGHT_END with i % 3 == 1 takes axis 1's position, i < WIDTH_END with i % 3 == 2 axis 2's."""
    Q_BLOCKS: tl.constexpr = (HQ + HEADS - 1) // HEADS
    KV_BLOCKS: tl.constexpr = (HKV + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = qkv + token * qkv_stride
    slot = tl.load(slots + token)
    in_block = tl.arange(0, HEADS)[:, None]
    if block < Q_BLOCKS + KV_BLOCKS:
        half = tl.arange(0, BLOCK_HALF)
        position = tl.load(positions + token) + tl.zeros([BLOCK_HALF], tl.int64)
        if HEIGHT_END > 0:
            height = tl.load(positions + positions_stride + token)
            position = tl.where((half % 3 == 1) & (half < HEIGHT_END), height, position)
        if WIDTH_END > 0:
            width = tl.load(positions + 2 * positions_stride + token)
            position = tl.where((half % 3 == 2) & (half < WIDTH_END), width, position)
        angles = cos_sin + position * (2 * HALF) + half
        cos = tl.load(angles, mask=half < HALF, other=0.0)[None, :]
        sin = tl.load(angles + HALF, mask=half < HALF, other=0.0)[None, :]
        if block < Q_BLOCKS:
            heads = block * HEADS + in_block
            _rotate_and_store(
                row,
                q_out + token * (HQ * D),
                D,
                q_weight,
                eps,
                cos,
                sin,
                heads,
                heads < HQ,
                1.0,
                D,
                HALF,
                BLOCK_HALF,
                BLOCK_REST,
                HAS_Q_WEIGHT,
                False,
            )
        elif slot >= 0:
            heads = (block - Q_BLOCKS) * HEADS + in_block
            scale = 1.0
            if QUANTIZED:
                scale = tl.load(k_scale + heads, mask=heads < HKV, other=1.0)
            target = k_cache + (slot // TOKENS_PER_PAGE) * k_page_stride + (slot % TOKENS_PER_PAGE) * k_token_stride
            _rotate_and_store(
                row + HQ * D,
                target,
                k_head_stride,
                k_weight,
                eps,
                cos,
                sin,
                heads,
                heads < HKV,
                scale,
                D,
                HALF,
                BLOCK_HALF,
                BLOCK_REST,
                HAS_K_WEIGHT,
                QUANTIZED,
            )
    elif slot >= 0:
        heads = (block - Q_BLOCKS - KV_BLOCKS) * HEADS + in_block
        columns = tl.arange(0, BLOCK_D)[None, :]
        inside = (heads < HKV) & (columns < D)
        values = tl.load(row + (HQ + HKV) * D + heads * D + columns, mask=inside, other=0.0)
        target = v_cache + (slot // TOKENS_PER_PAGE) * v_page_stride + (slot % TOKENS_PER_PAGE) * v_token_stride
        scale = 1.0
        if QUANTIZED:
            scale = tl.load(v_scale + heads, mask=heads < HKV, other=1.0)
        _store_heads(target + heads * v_head_stride + columns, values.to(tl.float32), inside, scale, QUANTIZED)


def settings(num_tokens: int, head_dim: int, *, batch_invariant: bool = False) -> dict[str, int]:
    """Heads and warps of a program: about 1024 elements, 8 a thread; few tokens are spread over more programs.

    `batch_invariant`: they are not, so that a head's sum of squares always runs in the same order.
    """
    block = next_power_of_2(head_dim)
    elements = ELEMENTS_PER_PROGRAM if num_tokens > 16 or batch_invariant else ELEMENTS_PER_PROGRAM // 4
    heads = max(1, elements // block)
    return {"HEADS": heads, "num_warps": num_warps_for(heads * block, most=4), "num_stages": 1}


def qk_norm_rope_launch(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    mrope_section: Sequence[int] | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Launch, torch.Tensor]:
    """The launch and the q that it fills."""
    num_tokens = qkv.shape[0]
    head_dim = qkv.shape[1] // (num_q_heads + 2 * num_kv_heads)
    half = cos_sin.shape[1] // 2
    tokens_per_page = k_cache.shape[2]
    assert qkv.stride(1) == 1
    assert cos_sin.is_contiguous()
    assert positions.stride(1) == 1 or num_tokens == 1
    assert k_cache.stride(3) == v_cache.stride(3) == 1
    quantized = k_scale is not None
    assert (v_scale is not None) == quantized
    if quantized:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    q_out = torch.empty((num_tokens, num_q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    setting = settings(num_tokens, head_dim, batch_invariant=batch_invariant)
    num_blocks = ceil_div(num_q_heads, setting["HEADS"]) + 2 * ceil_div(num_kv_heads, setting["HEADS"])
    height_end = width_end = 0
    if mrope_section is not None:
        height_end, width_end = min(half, 3 * mrope_section[1]), min(half, 3 * mrope_section[2])
    launch = Launch(
        _qk_norm_rope,
        (num_tokens, num_blocks),
        (
            qkv,
            cos_sin,
            positions,
            slots,
            qkv if q_weight is None else q_weight,
            qkv if k_weight is None else k_weight,
            cos_sin if k_scale is None else k_scale,
            cos_sin if v_scale is None else v_scale,
            q_out,
            k_cache,
            v_cache,
            qkv.stride(0),
            positions.stride(0),
            eps,
            *k_cache.stride()[:3],
            *v_cache.stride()[:3],
        ),
        {
            "HQ": num_q_heads,
            "HKV": num_kv_heads,
            "D": head_dim,
            "HALF": half,
            "TOKENS_PER_PAGE": tokens_per_page,
            "BLOCK_HALF": next_power_of_2(half),
            "BLOCK_REST": next_power_of_2(max(1, head_dim - 2 * half)),
            "BLOCK_D": next_power_of_2(head_dim),
            "HEIGHT_END": height_end,
            "WIDTH_END": width_end,
            "HAS_Q_WEIGHT": q_weight is not None,
            "HAS_K_WEIGHT": k_weight is not None,
            "QUANTIZED": quantized,
            # In deterministic mode the variant with three axes gives a text's tokens the bits of the other one.
            "enable_fp_fusion": not batch_invariant,
            **setting,
        },
    )
    return launch, q_out


def qk_norm_rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    mrope_section: Sequence[int] | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """See `aiexport_edge.kernels.qk_norm_rope.qk_norm_rope_reference`.

    With k_scale and v_scale (float32 [Hkv]) the caches are float8_e4m3fn, or uint8 that hold its codes.
    """
    launch, q = qk_norm_rope_launch(
        qkv,
        cos_sin,
        positions,
        slots,
        k_cache,
        v_cache,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        q_weight=q_weight,
        k_weight=k_weight,
        eps=eps,
        mrope_section=mrope_section,
        k_scale=k_scale,
        v_scale=v_scale,
        batch_invariant=batch_invariant,
    )
    launch.run()
    return q
