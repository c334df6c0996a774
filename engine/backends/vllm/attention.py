"""This project's attention kernels as a vLLM attention backend.

A thin adapter: vLLM's metadata of a step becomes the arguments of `kernels.paged_attention` and
`kernels.decode_attention`, which take any page size and any strides. vLLM keeps the keys and values of a layer in one
tensor [num_blocks, Hkv, block_size, 2 * D], a head's key before its value, in whatever physical order it likes: both
caches are views of it, and a vLLM block is a page.

Runs in vLLM's worker processes, which make it by its name (`plugin.py`): as CUSTOM on a card, in the place of vLLM's
only backend on a processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from aiexport_edge.kernels.decode_attention import decode_attention
from aiexport_edge.kernels.paged_attention import paged_attention
from aiexport_edge.kernels.threads import set_num_threads

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

CLASS_PATH = "aiexport_edge.engine.backends.vllm.attention.EdgeAttentionBackend"


def register_attention() -> None:
    """Makes the backend known to vLLM, in the process that calls it."""
    on_processor = current_platform.is_cpu()
    register_backend(AttentionBackendEnum.CPU_ATTN if on_processor else AttentionBackendEnum.CUSTOM, CLASS_PATH)


@dataclass(frozen=True, slots=True)
class EdgeAttentionMetadata:
    """A step, for all layers: the sequences with one new token first, `num_decodes` of them, then the others.

    `slot_mapping` int64 [T]: block * block_size + offset of each new token. `prefill_start_loc` counts from the first
    token of the first sequence that is not a decode.
    """

    num_tokens: int
    num_decodes: int
    block_table: torch.Tensor  # int32 [B, max_blocks]
    seq_lens: torch.Tensor  # int32 [B]
    prefill_start_loc: torch.Tensor  # int32 [B - num_decodes + 1]
    slot_mapping: torch.Tensor


class EdgeAttentionMetadataBuilder(AttentionMetadataBuilder[EdgeAttentionMetadata]):
    """From vLLM's metadata of a step to ours. vLLM puts the decodes first (`reorder_batch_threshold`)."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER
    reorder_batch_threshold = 1

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type == "cpu":
            import aiexport_edge.kernels.cpu.attention  # noqa: F401  # compiles, if it has never been

            set_num_threads(torch.get_num_threads())

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> EdgeAttentionMetadata:
        common = common_attn_metadata
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common)
        return EdgeAttentionMetadata(
            num_tokens=common.num_actual_tokens,
            num_decodes=num_decodes,
            block_table=common.block_table_tensor[: common.num_reqs],
            seq_lens=common.seq_lens[: common.num_reqs],
            prefill_start_loc=common.query_start_loc[num_decodes : common.num_reqs + 1] - num_decode_tokens,
            slot_mapping=common.slot_mapping[: common.num_actual_tokens],
        )


class EdgeAttentionImpl(AttentionImpl[EdgeAttentionMetadata]):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        lacking = {
            "ALiBi": alibi_slopes is not None,
            "a soft cap of logits": bool(logits_soft_cap),
            "attention that is not a decoder's": attn_type != AttentionType.DECODER,
            "keys and values shared between layers": kv_sharing_target_layer_name is not None,
            **{name: value is not None for name, value in others.items()},
        }
        if wanted := [name for name, is_wanted in lacking.items() if is_wanted]:
            raise NotImplementedError(f"these attention kernels have no {', '.join(wanted)}; use attention = auto")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window or 0
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: EdgeAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, output [T, Hq, D]; key, value [T, Hkv, D]; kv_cache [num_blocks, Hkv, block_size, 2 * D]. T may count
        rows of padding, which stay as they are. Writes and returns `output`."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("these attention kernels do not quantize what they write")
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        meta, num_tokens, num_decodes = attn_metadata, attn_metadata.num_tokens, attn_metadata.num_decodes
        k_cache, v_cache = kv_cache[..., : self.head_size], kv_cache[..., self.head_size :]
        block_size = kv_cache.shape[2]
        blocks, offsets = meta.slot_mapping // block_size, meta.slot_mapping % block_size
        k_cache.transpose(1, 2)[blocks, offsets] = key[:num_tokens]
        v_cache.transpose(1, 2)[blocks, offsets] = value[:num_tokens]
        if num_decodes:
            output[:num_decodes] = decode_attention(
                query[:num_decodes],
                k_cache,
                v_cache,
                meta.block_table[:num_decodes],
                meta.seq_lens[:num_decodes],
                scale=self.scale,
                sliding_window=self.sliding_window,
            )
        if num_tokens > num_decodes:
            output[num_decodes:num_tokens] = paged_attention(
                query[num_decodes:num_tokens],
                k_cache,
                v_cache,
                meta.block_table[num_decodes:],
                meta.prefill_start_loc,
                meta.seq_lens[num_decodes:],
                scale=self.scale,
                sliding_window=self.sliding_window,
            )
        return output


class EdgeAttentionBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[EdgeAttentionImpl]:
        return EdgeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[EdgeAttentionMetadataBuilder]:
        return EdgeAttentionMetadataBuilder

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0 and head_size <= 256

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True
