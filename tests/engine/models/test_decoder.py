"""What the runner does not use yet: embeddings as input, three rows of positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from support.tiny_models import make, prompts, save

from aiexport_edge.engine.core.kv_memory import KVMemory, PoolShape
from aiexport_edge.engine.models.decoder import Batch
from aiexport_edge.engine.models.loader import load_model


@torch.inference_mode()
def test_embeddings_or_ids_and_any_rows(tmp_path: Path) -> None:
    model = load_model(save("qwen3", tmp_path))
    config, decoder = model.config, model.decoder
    memory = KVMemory(PoolShape(1 << 14, 8, ((1 << 14) // config.kv_bytes_per_token(4),)), torch.device("cpu"))
    kv_caches = memory.layers(
        0,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=torch.float32,
    )
    text = prompts([12])[0]
    tokens_per_page = memory.shape.tokens_per_page[0]
    assert tokens_per_page >= 12
    batch = Batch(
        input_ids=torch.tensor(text),
        inputs_embeds=None,
        positions=torch.arange(12).repeat(3, 1),
        slots=torch.arange(12) + 3 * tokens_per_page,
        block_tables=torch.tensor([[3]], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 12], dtype=torch.int32),
        seq_lens=torch.tensor([12], dtype=torch.int32),
        rows=None,
    )
    every = decoder.logits(decoder.forward(batch, kv_caches))
    assert every.shape == (12, config.vocab_size)
    assert every.dtype == torch.float32
    expected = make("qwen3")(torch.tensor([text])).logits[0]
    torch.testing.assert_close(every, expected, rtol=0, atol=1e-4)

    rows = torch.tensor([2, 11])
    some = decoder.logits(decoder.forward(replace(batch, rows=rows), kv_caches))
    torch.testing.assert_close(some, expected[rows], rtol=0, atol=1e-4)

    none = decoder.forward(replace(batch, rows=torch.tensor([], dtype=torch.int64)), kv_caches)
    assert none.shape == (0, config.hidden_size)

    assert decoder.embedding is not None
    embeds = decoder.embedding[batch.input_ids]
    given = decoder.forward(replace(batch, input_ids=None, inputs_embeds=embeds), kv_caches)
    torch.testing.assert_close(decoder.logits(given), expected, rtol=0, atol=1e-4)
