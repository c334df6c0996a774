"""Everything between the QKV product and attention: per-head norm of q and k, rotary embedding, KV write. One pass.

Rotary embedding: J. Su et al., "RoFormer", 2021, in the NeoX layout (a head's first half pairs with its second). The
three-axis form is Qwen3-VL's interleaved M-RoPE. Knows pages only as slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aiexport_edge.kernels import kv_codes


def _rotation_reference(
    cos_sin: torch.Tensor, positions: torch.Tensor, mrope_section: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, rot_dim/2]; frequency i takes its position from axis i % 3 within that axis' section."""
    rows = cos_sin[positions[0]]
    if mrope_section is not None:
        half = cos_sin.shape[1] // 2
        rows = rows.clone()
        for axis in (1, 2):
            columns = torch.arange(axis, min(half, 3 * mrope_section[axis]), 3, device=cos_sin.device)
            columns = torch.cat((columns, columns + half))
            rows[:, columns] = cos_sin[positions[axis]][:, columns]
    cos, sin = rows.unsqueeze(1).chunk(2, dim=-1)
    return cos, sin


def _norm_rope_reference(
    heads: torch.Tensor, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """heads [T, N, D] in float32, normed where there is a weight, first rot_dim dimensions rotated."""
    if weight is not None:
        heads = heads * torch.rsqrt(heads.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    half = cos.shape[-1]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def qk_norm_rope_reference(
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
) -> torch.Tensor:
    """Norm (where weights are given) and rotate q and k, write k and v into the cache, return q [T, Hq, D].

    qkv [T, (Hq + 2*Hkv) * D]: all q heads, then k heads, then v heads. cos_sin [max_pos, rot_dim] float32, the cosine
    half first; rot_dim even and at most D. positions int64 [3, T]: time, height, width; only the first is read unless
    `mrope_section` gives the frequencies per axis. slots int64 [T]: page * tokens_per_page + offset, -1 writes nothing.
    k_cache, v_cache [num_pages, Hkv, tokens_per_page, D], strided views with the last dimension contiguous, written in
    place in their own dtype. q_weight, k_weight [D]. With k_scale and v_scale (float32 [Hkv]) the caches get E4M3 codes
    (`kv_codes`), as float8_e4m3fn or uint8. float32 inside; q comes back in qkv's dtype.
    """
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, num_q_heads + 2 * num_kv_heads, k_cache.shape[3]).float()
    q, k, v = torch.split_with_sizes(heads, (num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = _rotation_reference(cos_sin, positions, mrope_section)
    q = _norm_rope_reference(q, q_weight, eps, cos, sin)
    k = _norm_rope_reference(k, k_weight, eps, cos, sin)
    kept = slots >= 0
    tokens_per_page = k_cache.shape[2]
    pages, offsets = slots[kept] // tokens_per_page, slots[kept] % tokens_per_page
    if k_scale is not None and v_scale is not None:
        k_cache.view(torch.uint8)[pages, :, offsets] = kv_codes.encode(k[kept], k_scale).view(torch.uint8)
        v_cache.view(torch.uint8)[pages, :, offsets] = kv_codes.encode(v[kept], v_scale).view(torch.uint8)
    else:
        k_cache[pages, :, offsets] = k[kept].to(k_cache.dtype)
        v_cache[pages, :, offsets] = v[kept].to(v_cache.dtype)
    return q.to(qkv.dtype)


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
    """See `qk_norm_rope_reference`.

    `batch_invariant`: a token's bits do not depend on what is computed with it. On the CPU they never do.
    """
    if qkv.device.type == "cpu":
        from aiexport_edge.kernels.cpu import rope as cpu

        return cpu.qk_norm_rope(
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
        )
    if qkv.is_cuda:
        from aiexport_edge.kernels.gpu import qk_norm_rope as gpu

        return gpu.qk_norm_rope(
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
    return qk_norm_rope_reference(
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
    )
