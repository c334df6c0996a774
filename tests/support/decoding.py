"""Logits of a loaded model for one text, without scheduler or pool."""

from __future__ import annotations

import torch

from aiexport_edge.engine.core.kv_memory import KVMemory, PoolShape
from aiexport_edge.engine.models.decoder import Batch
from aiexport_edge.engine.models.loader import LoadedModel


def logits_of(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    """float32 [tokens, vocabulary], each token's after those before it."""
    length, config = ids.shape[0], model.config
    page_bytes = config.kv_bytes_per_token(model.kv_dtype.itemsize) * length
    memory = KVMemory(PoolShape(page_bytes, 2, (length,)), torch.device("cpu"))
    caches = memory.layers(
        0,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=model.kv_dtype,
    )
    batch = Batch(
        input_ids=ids,
        inputs_embeds=None,
        positions=torch.arange(length).expand(3, -1),
        slots=length + torch.arange(length),
        block_tables=torch.ones(1, 1, dtype=torch.int32),
        query_start_loc=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        rows=None,
    )
    return model.decoder.logits(model.decoder.forward(batch, caches))
