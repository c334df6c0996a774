"""The one decoder: Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE and Qwen3-VL's differ in its configuration, not in its code.

Owns the order of operations; every operation is a kernel, and whatever depends on the device is theirs. Knows no
requests and no page accounting: a `Batch` says where each token's keys and values are written and read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.kernels.decode_attention import decode_attention, plan_decode
from aiexport_edge.kernels.gather import add_to_rows, gather_rows
from aiexport_edge.kernels.linear import PackedLinear
from aiexport_edge.kernels.moe import Experts, route
from aiexport_edge.kernels.paged_attention import paged_attention, plan_attention
from aiexport_edge.kernels.qk_norm_rope import qk_norm_rope
from aiexport_edge.kernels.rms_norm import add_rms_norm, rms_norm
from aiexport_edge.kernels.swiglu import swiglu

if TYPE_CHECKING:
    from aiexport_edge.engine.models.adapted import AdaptedLinear, BatchAdapters
    from aiexport_edge.kernels.cpu.attention import AttentionPlan

KVCache = tuple[Tensor, Tensor]
Plans = dict[int, "Tensor | AttentionPlan | None"]  # `plan_decode` or `plan_attention` of this step, by sliding window


@dataclass(frozen=True, slots=True)
class ImageTokens:
    """The tokens of a batch that stand for pictures: rows int64 [M], each once.

    features [M, hidden] stand for their embeddings. deepstack: what is added to them after the first layer, the
    second …, [M, hidden] each. All in the model's dtype.
    """

    rows: Tensor
    features: Tensor
    deepstack: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of B sequences, one sequence after the other; built whole in one place (`engine/core/batch.py`).

    Either `input_ids` int64 [T] or `inputs_embeds` [T, hidden] in the model's dtype is given, the other is None.
    positions int64 [3, T]: time, height, width; text has the same in all three, and only with `has_axes` may they
    differ. slots int64 [T]: where a token's
    keys and values go, page * tokens_per_page + offset, -1 for nowhere. block_tables int32 [B, max_pages],
    query_start_loc int32 [B+1], seq_lens int32 [B] as `paged_attention` wants them. rows int64 [S]: the tokens whose
    logits are asked for, ascending; None means all T. `is_decode`: every sequence has one new token, and the
    operation that is made for that is used. `image_tokens` of `input_ids` are not looked up. `adapters` are the tokens'
    own, where any has one.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    rows: Tensor | None
    is_decode: bool = False
    has_axes: bool = False
    image_tokens: ImageTokens | None = None
    adapters: BatchAdapters | None = None


@dataclass(frozen=True, slots=True)
class Mlp:
    """A SwiGLU layer."""

    gate_up: PackedLinear | AdaptedLinear
    down: PackedLinear | AdaptedLinear

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(hidden)))


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """SwiGLU layers of which each token takes a few."""

    router: PackedLinear
    experts: Experts
    top_k: int
    normalize: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.router(hidden, out_dtype=torch.float32)
        return self.experts(hidden, *route(logits, self.top_k, normalize=self.normalize))


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer; norms [hidden] or [head_dim], products packed. `sliding_window` 0 sees everything.

    `k_scale` and `v_scale` (float32 [KV heads]) are there where keys and values are kept in FP8 (`kernels.kv_codes`).
    """

    input_norm: Tensor
    qkv: PackedLinear | AdaptedLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: PackedLinear | AdaptedLinear
    post_attention_norm: Tensor
    mlp: Mlp | MixtureOfExperts
    sliding_window: int
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class Decoder:
    """Token ids to logits, over paged keys and values. `embedding` None: it is tied to the head, which gathers."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        embedding: Tensor | None,
        layers: Sequence[Layer],
        norm: Tensor,
        head: PackedLinear,
        cos_sin: Tensor,
        deterministic: bool = False,
    ) -> None:
        """`deterministic`: a token's bits depend on the tokens before it alone; the products must have been made so."""
        self.config = config
        self.embedding = embedding
        self.layers = tuple(layers)
        self.norm = norm
        self.head = head
        self.cos_sin = cos_sin
        self.deterministic = deterministic
        self.scale = config.head_dim**-0.5
        self._windows = frozenset(layer.sliding_window for layer in layers)

    def plan(self, batch: Batch, kv_caches: Sequence[KVCache]) -> Plans:
        """How `forward` of `batch` cuts up its attention, where the layers share that."""
        num_tokens = batch.slots.shape[0]
        k_cache = kv_caches[0][0]
        q = torch.empty(  # for its shape alone
            (num_tokens, self.config.num_q_heads, self.config.head_dim), dtype=self.norm.dtype, device=k_cache.device
        )
        if batch.is_decode:
            return {
                window: plan_decode(
                    q,
                    k_cache,
                    batch.block_tables,
                    batch.seq_lens,
                    sliding_window=window,
                    batch_invariant=self.deterministic,
                )
                for window in self._windows
            }
        return {
            window: plan_attention(
                q, k_cache, batch.block_tables, batch.query_start_loc, batch.seq_lens, sliding_window=window
            )
            for window in self._windows
        }

    def forward(self, batch: Batch, kv_caches: Sequence[KVCache], plans: Plans | None = None) -> Tensor:
        """Run `batch`, writing keys and values into `kv_caches` (one pair per layer, see `paged_attention`).

        Returns the hidden states [S, hidden] of `batch.rows` in the model's dtype, ready for `logits`. In the last
        layer all that comes after the keys and values is computed for those rows only. `plans`: what `plan` said, or
        None to have it found again.
        """
        hidden, residual = self.embed(batch), None
        plans = self.plan(batch, kv_caches) if plans is None else plans
        images, adapters = batch.image_tokens, batch.adapters
        for index, (layer, kv_cache) in enumerate(zip(self.layers[:-1], kv_caches, strict=False)):
            if adapters is not None:
                layer = adapters.apply(layer, index)
            hidden, residual = self._norm(hidden, residual, layer.input_norm)
            q = self._project(layer, hidden, batch, kv_cache)
            hidden = layer.o(self._attend(layer, q, batch, kv_cache, plans))
            hidden, residual = self._mlp(layer, hidden, residual)
            if images is not None and index < len(images.deepstack):
                add_to_rows(hidden, images.rows, images.deepstack[index])
        layer, kv_cache = self._last_layer(adapters), kv_caches[-1]
        hidden, residual = self._norm(hidden, residual, layer.input_norm)
        q = self._project(layer, hidden, batch, kv_cache)
        if batch.rows is not None and batch.rows.shape[0] == 0:
            return hidden[:0]
        attended = self._attend(layer, q, batch, kv_cache, plans)
        if batch.rows is not None:
            attended, residual = gather_rows(attended, batch.rows), gather_rows(residual, batch.rows)
            if adapters is not None:
                layer = self._last_layer(adapters.at(batch.rows))
        hidden, residual = self._mlp(layer, layer.o(attended), residual)
        return self._norm(hidden, residual, self.norm)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocabulary] of hidden states [S, hidden] that `forward` returned."""
        return self.head(hidden, out_dtype=torch.float32)

    def embed(self, batch: Batch) -> Tensor:
        """What goes into the first layer, [T, hidden] in the model's dtype."""
        if batch.inputs_embeds is not None:
            return batch.inputs_embeds
        assert batch.input_ids is not None
        if self.embedding is None:
            embedded = self.head.gather(batch.input_ids)
        else:
            embedded = gather_rows(self.embedding, batch.input_ids)
        if batch.image_tokens is not None:
            embedded.index_copy_(0, batch.image_tokens.rows, batch.image_tokens.features)
        return embedded

    def _last_layer(self, adapters: BatchAdapters | None) -> Layer:
        layer = self.layers[-1]
        return layer if adapters is None else adapters.apply(layer, len(self.layers) - 1)

    def _norm(self, hidden: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the residual stream (which begins here where there is none) and norm it: (normed, residual)."""
        if residual is None:
            return rms_norm(hidden, weight, self.config.rms_norm_eps), hidden
        return add_rms_norm(hidden, residual, weight, self.config.rms_norm_eps)

    def _project(self, layer: Layer, hidden: Tensor, batch: Batch, kv_cache: KVCache) -> Tensor:
        """Write the tokens' keys and values; return their queries [T, num_q_heads, head_dim]."""
        return qk_norm_rope(
            layer.qkv(hidden),
            self.cos_sin,
            batch.positions,
            batch.slots,
            *kv_cache,
            num_q_heads=self.config.num_q_heads,
            num_kv_heads=self.config.num_kv_heads,
            q_weight=layer.q_norm,
            k_weight=layer.k_norm,
            eps=self.config.rms_norm_eps,
            mrope_section=self.config.rope.mrope_section if batch.has_axes else None,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            batch_invariant=self.deterministic,
        )

    def _attend(self, layer: Layer, q: Tensor, batch: Batch, kv_cache: KVCache, plans: Plans) -> Tensor:
        """Attention before its output product: [T, num_q_heads * head_dim]."""
        window = layer.sliding_window
        if batch.is_decode:
            attended = decode_attention(
                q,
                *kv_cache,
                batch.block_tables,
                batch.seq_lens,
                scale=self.scale,
                sliding_window=window,
                k_scale=layer.k_scale,
                v_scale=layer.v_scale,
                plan=plans[window],
                batch_invariant=self.deterministic,
            )
        else:
            plan = plans[window]
            assert not isinstance(plan, Tensor)
            attended = paged_attention(
                q,
                *kv_cache,
                batch.block_tables,
                batch.query_start_loc,
                batch.seq_lens,
                scale=self.scale,
                sliding_window=window,
                k_scale=layer.k_scale,
                v_scale=layer.v_scale,
                plan=plan,
                batch_invariant=self.deterministic,
            )
        return attended.view(attended.shape[0], -1)

    def _mlp(self, layer: Layer, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = add_rms_norm(hidden, residual, layer.post_attention_norm, self.config.rms_norm_eps)
        return layer.mlp(hidden), residual
