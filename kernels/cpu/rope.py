"""QK norm, rotary embedding and KV write. A unit of work is a few tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from aiexport_edge.kernels.cpu.jit import inner, kernel
from aiexport_edge.kernels.cpu.memory import (
    as_float,
    get_float32,
    get_int64,
    load,
    load_first,
    narrow,
    set_float32,
    store,
    store_first,
    widen,
)
from aiexport_edge.kernels.cpu.norm import scale_row
from aiexport_edge.kernels.cpu.simd import LANES, divide, fma, multiply, negate, splat
from aiexport_edge.kernels.cpu.units import DTYPES, KV_DTYPES, begin, end, next_unit
from aiexport_edge.kernels.threads import empty, float_bits, launch

TOKENS_PER_UNIT = 4


@inner
def _find_rotation(
    cos_sin: int, half: int, positions: int, axis_stride: int, token: int, height_end: int, width_end: int, mixed: int
) -> int:
    """Address of the token's cosines, sines behind them; put together in `mixed` where axes differ."""
    row_bytes = 8 * half
    time: int = cos_sin + get_int64(positions, token) * row_bytes
    if height_end == 0 and width_end == 0:
        return time
    height = cos_sin + get_int64(positions, axis_stride + token) * row_bytes
    width = cos_sin + get_int64(positions, 2 * axis_stride + token) * row_bytes
    for i in range(half):
        source = time
        if i % 3 == 1 and i < height_end:
            source = height
        elif i % 3 == 2 and i < width_end:
            source = width
        set_float32(mixed, i, get_float32(source, i))
        set_float32(mixed, half + i, get_float32(source, half + i))
    return mixed


@inner
def _rotate(head: int, rotation: int, half: int) -> None:
    """Rotate the first 2 * half numbers of a float32 head in place."""
    for i in range(0, half, LANES):
        count = half - i
        first, second = load_first(head + 4 * i, count), load_first(head + 4 * (half + i), count)
        cos, sin = load_first(rotation + 4 * i, count), load_first(rotation + 4 * (half + i), count)
        store_first(head + 4 * i, fma(first, cos, negate(multiply(second, sin))), count)
        store_first(head + 4 * (half + i), fma(second, cos, multiply(first, sin)), count)


@inner
def _shrink(head: int, scale: float, count: int) -> None:
    """A float32 head over its scale."""
    by = splat(np.float32(scale))
    for i in range(0, count, LANES):
        store(head + 4 * i, divide(load(head + 4 * i), by))


@kernel
def norm_rope_tokens(
    control: int,
    scratch: int,
    num_units: int,
    qkv: int,
    out: int,
    dtype: int,
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos_sin: int,
    half: int,
    positions: int,
    axis_stride: int,
    height_end: int,
    width_end: int,
    slots: int,
    keys: int,
    values: int,
    kv_dtype: int,
    tokens_per_page: int,
    k_page: int,
    k_head: int,
    k_token: int,
    v_page: int,
    v_head: int,
    v_token: int,
    k_scales: int,
    v_scales: int,
    q_weight: int,
    k_weight: int,
    weight_dtype: int,
    eps_bits: int,
) -> None:
    """q heads to `out`, k and v heads to their pages. A weight of 0 is no norm; codes are of a head over its scale."""
    padded = (head_dim + LANES - 1) // LANES * LANES
    head, wide_q_weight, wide_k_weight = scratch, scratch + 4 * padded, scratch + 8 * padded
    mixed = scratch + 12 * padded
    item = 4 if dtype == 0 else 2
    eps = as_float(eps_bits)
    unit = begin(control)
    if unit < num_units and q_weight != 0:
        widen(weight_dtype, q_weight, wide_q_weight, head_dim)
    if unit < num_units and k_weight != 0:
        widen(weight_dtype, k_weight, wide_k_weight, head_dim)
    while unit < num_units:
        for token in range(unit * TOKENS_PER_UNIT, min((unit + 1) * TOKENS_PER_UNIT, num_tokens)):
            rotation = _find_rotation(cos_sin, half, positions, axis_stride, token, height_end, width_end, mixed)
            source = qkv + token * (num_q_heads + 2 * num_kv_heads) * head_dim * item
            for number in range(num_q_heads):
                widen(dtype, source + number * head_dim * item, head, head_dim)
                if q_weight != 0:
                    scale_row(head, wide_q_weight, head_dim, eps)
                _rotate(head, rotation, half)
                narrow(dtype, head, out + (token * num_q_heads + number) * head_dim * item, head_dim)
            slot = get_int64(slots, token)
            if slot < 0:
                continue
            page, offset = slot // tokens_per_page, slot % tokens_per_page
            for number in range(num_kv_heads):
                key = source + (num_q_heads + number) * head_dim * item
                widen(dtype, key, head, head_dim)
                if k_weight != 0:
                    scale_row(head, wide_k_weight, head_dim, eps)
                _rotate(head, rotation, half)
                if k_scales != 0:
                    _shrink(head, get_float32(k_scales, number), head_dim)
                narrow(kv_dtype, head, keys + page * k_page + number * k_head + offset * k_token, head_dim)
                widen(dtype, key + num_kv_heads * head_dim * item, head, head_dim)
                if v_scales != 0:
                    _shrink(head, get_float32(v_scales, number), head_dim)
                narrow(kv_dtype, head, values + page * v_page + number * v_head + offset * v_token, head_dim)
        unit = next_unit(control)
    end(control)


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
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    mrope_section: Sequence[int] | None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `aiexport_edge.kernels.qk_norm_rope.qk_norm_rope_reference`."""
    qkv, cos_sin = qkv.contiguous(), cos_sin.contiguous()
    num_tokens, head_dim = qkv.shape[0], k_cache.shape[3]
    assert slots.dtype == positions.dtype == torch.int64
    assert positions.stride(1) == slots.stride(0) == 1 or num_tokens == 1
    assert cos_sin.dtype == torch.float32
    assert qkv.shape[1] == (num_q_heads + 2 * num_kv_heads) * head_dim
    kv_bytes = k_cache.element_size()
    k_page, k_head, k_token, k_item = (kv_bytes * stride for stride in k_cache.stride())
    v_page, v_head, v_token, v_item = (kv_bytes * stride for stride in v_cache.stride())
    assert k_item == v_item == kv_bytes
    assert (k_scale is not None) == (v_scale is not None) == (kv_bytes == 1)
    weight = q_weight if k_weight is None else k_weight
    out = empty((num_tokens, num_q_heads, head_dim), qkv.dtype)
    launch(
        norm_rope_tokens,
        -(-num_tokens // TOKENS_PER_UNIT),
        0.5 * qkv.numel(),
        12 * (head_dim + LANES) + 4 * cos_sin.shape[1],
        qkv.data_ptr(),
        out.data_ptr(),
        DTYPES[qkv.dtype],
        num_tokens,
        num_q_heads,
        num_kv_heads,
        head_dim,
        cos_sin.data_ptr(),
        cos_sin.shape[1] // 2,
        positions.data_ptr(),
        positions.stride(0),
        0 if mrope_section is None else 3 * mrope_section[1],
        0 if mrope_section is None else 3 * mrope_section[2],
        slots.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        KV_DTYPES[k_cache.dtype],
        k_cache.shape[2],
        k_page,
        k_head,
        k_token,
        v_page,
        v_head,
        v_token,
        0 if k_scale is None else k_scale.data_ptr(),
        0 if v_scale is None else v_scale.data_ptr(),
        0 if q_weight is None else q_weight.data_ptr(),
        0 if k_weight is None else k_weight.data_ptr(),
        0 if weight is None else DTYPES[weight.dtype],
        float_bits(eps),
    )
    return out
