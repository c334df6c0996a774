"""What every attention kernel here shares: one tile of keys and values, read in place, and the merge of partial sums.

Softmax runs online in base 2 (M. Milakov, N. Gimelshein, 2018; T. Dao et al., "FlashAttention", 2022). The rows of a
tile are the query heads of one KV head, of one token or several, so a key is read once for all of them. A partial
result is a state: the attended values of a part of the keys and the base-2 logarithm of their softmax' denominator,
-inf where that part is empty (Z. Ye et al., "FlashInfer", 2025).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aiexport_edge.kernels.gpu.elementwise import E4M3_DECODED_SCALE, decode_e4m3
from aiexport_edge.kernels.gpu.launch import Launch, next_power_of_2

LOG2_E = 1.4426950408889634
STATES_AT_ONCE = 8

# How much of a tile is visible.
ALL = tl.constexpr(0)  # every key, to every row
BETWEEN = tl.constexpr(1)  # keys at positions first <= p < end, to every row
CAUSAL = tl.constexpr(2)  # those, up to each row's own position and within its sliding window


@triton.jit
def owner_of_block(starts, count, block, TOKENS: tl.constexpr):
    """Whose the block is, where owner i has tokens starts[i] … starts[i+1] and at most one block partly filled."""
    low = 0
    high = count
    while low < high:  # the last owner whose first block is not after this one
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def attend_tile(
    q,
    highest,
    denominator,
    attended,
    tile,
    first,
    end,
    row_positions,
    factor,
    k_head,
    v_head,
    block_table,
    k_page_stride,
    k_token_stride,
    v_page_stride,
    v_token_stride,
    VISIBLE: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    TOKENS_PER_PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """Fold keys at positions tile*TILE … into the running softmax of rows q [M, BLOCK_D].

    highest, denominator float32 [M]; attended float32 [M, BLOCK_D], not yet divided. factor: the scores', with log2(e).
    Entries of the block table and slots of pages outside of first <= p < end are never read.
    """
    positions = tile * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, BLOCK_D)
    if VISIBLE == ALL:
        pages = tl.load(block_table + positions // TOKENS_PER_PAGE).to(tl.int64)
        key_inside = tl.full([1, TILE], True, tl.int1)
        value_inside = tl.full([TILE, 1], True, tl.int1)
    else:
        inside = (positions >= first) & (positions < end)
        pages = tl.load(block_table + positions // TOKENS_PER_PAGE, mask=inside, other=0).to(tl.int64)
        key_inside = inside[None, :]
        value_inside = inside[:, None]
    offsets = positions % TOKENS_PER_PAGE
    k_rows = k_head + pages * k_page_stride + offsets * k_token_stride
    v_rows = v_head + pages * v_page_stride + offsets * v_token_stride
    if VISIBLE == ALL and D == BLOCK_D:
        k = tl.load(k_rows[None, :] + dims[:, None])
    else:
        k = tl.load(k_rows[None, :] + dims[:, None], mask=key_inside & (dims < D)[:, None], other=0)
    if QUANTIZED:
        k = decode_e4m3(k, q.dtype)
    scores = tl.dot(q, k, input_precision="ieee") * factor
    if VISIBLE == BETWEEN:
        scores = tl.where(key_inside, scores, float("-inf"))
    if VISIBLE == CAUSAL:
        visible = key_inside & (positions[None, :] <= row_positions[:, None])
        if WINDOW > 0:
            visible &= positions[None, :] > row_positions[:, None] - WINDOW
        scores = tl.where(visible, scores, float("-inf"))
    now_highest = tl.maximum(highest, tl.max(scores, 1))
    base = now_highest
    if VISIBLE == CAUSAL:
        base = tl.where(now_highest == float("-inf"), 0.0, now_highest)  # a row that has seen nothing: -inf - -inf
    rescale = tl.exp2(highest - base)
    weights = tl.exp2(scores - base[:, None])
    if VISIBLE == ALL and D == BLOCK_D:
        v = tl.load(v_rows[:, None] + dims[None, :])
    else:
        v = tl.load(v_rows[:, None] + dims[None, :], mask=value_inside & (dims < D)[None, :], other=0)
    if QUANTIZED:
        v = decode_e4m3(v, q.dtype)
    attended = tl.dot(weights.to(q.dtype), v, attended * rescale[:, None], input_precision="ieee")
    return now_highest, denominator * rescale + tl.sum(weights, 1), attended


@triton.jit(do_not_specialize=["num_prefix_states", "num_states"])
def _merge_states(
    states,
    logs,
    prefix_splits,
    suffix_splits,
    out,
    num_prefix_states,
    num_states,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    BLOCK_STATES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """out [B, HQ, D]: prefix_splits[b] of the first num_prefix_states, suffix_splits[b] of the other states, merged."""
    sequence = tl.program_id(0).to(tl.int64)
    num_suffix = tl.load(suffix_splits + sequence)
    num_prefix = 0
    if HAS_PREFIX:
        num_prefix = tl.load(prefix_splits + sequence)
    if (num_prefix == 0) & (num_suffix <= 1):
        return  # the attention kernel wrote the result itself
    row = sequence * HQ + tl.program_id(1)
    index = tl.arange(0, BLOCK_STATES)
    valid = tl.where(index < num_prefix_states, index < num_prefix, index - num_prefix_states < num_suffix)
    valid &= index < num_states
    highest = tl.max(tl.load(logs + row * num_states + index, mask=valid, other=float("-inf")), 0)
    dims = tl.arange(0, BLOCK_D)
    merged = tl.zeros([BLOCK_D], tl.float32)
    total = 0.0
    for start in range(0, num_prefix_states + num_suffix, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        used = tl.where(some < num_prefix_states, some < num_prefix, some - num_prefix_states < num_suffix)
        log = tl.load(logs + row * num_states + some, mask=used, other=float("-inf"))
        weight = tl.exp2(log - highest)
        values = tl.load(
            states + (row * num_states + some)[:, None] * D + dims[None, :],
            mask=(log > float("-inf"))[:, None] & (dims < D)[None, :],
            other=0.0,
        )
        merged += tl.sum(values * weight[:, None], 0)
        total += tl.sum(weight, 0)
    tl.store(out + row * D + dims, (merged / total).to(out.dtype.element_ty), mask=dims < D)


def merge_states_launch(
    states: torch.Tensor,
    logs: torch.Tensor,
    prefix_splits: torch.Tensor | None,
    suffix_splits: torch.Tensor,
    out: torch.Tensor,
    *,
    num_prefix_states: int,
) -> Launch:
    """Merge states [B, Hq, S, D] with logs [B, Hq, S] into out [B, Hq, D]. Split counts int32 [B]."""
    batch, num_heads, num_states, head_dim = states.shape
    return Launch(
        _merge_states,
        (batch, num_heads),
        (
            states,
            logs,
            suffix_splits if prefix_splits is None else prefix_splits,
            suffix_splits,
            out,
            num_prefix_states,
            num_states,
        ),
        {
            "HQ": num_heads,
            "D": head_dim,
            "BLOCK_D": next_power_of_2(head_dim),
            "HAS_PREFIX": prefix_splits is not None,
            "BLOCK_STATES": next_power_of_2(num_states),
            "AT_ONCE": STATES_AT_ONCE,
            "num_warps": 2,
            "num_stages": 2,
        },
    )


def padded_head_dim(head_dim: int) -> int:
    """Dimensions of a tile: the matrix units multiply 16 at least."""
    return max(16, next_power_of_2(head_dim))


def score_factor(scale: float, *, quantized: bool) -> float:
    """What products of q and stored keys are multiplied by, in base 2, k_scale apart."""
    return scale * LOG2_E * (E4M3_DECODED_SCALE if quantized else 1.0)
