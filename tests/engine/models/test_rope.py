"""Rotary tables against transformers', bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import DEFAULT_ROPE, DYNAMIC_ROPE, LINEAR_ROPE, LLAMA3_ROPE, SHAPE, YARN_ROPE
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.engine.models.rope import cos_sin_table

KINDS: dict[str, dict[str, Any]] = {
    "default": DEFAULT_ROPE,
    "theta": DEFAULT_ROPE | {"rope_theta": 1e6},
    "linear": LINEAR_ROPE,
    "dynamic": DYNAMIC_ROPE,
    "llama3": LLAMA3_ROPE,
    "yarn": YARN_ROPE,
    "yarn_betas": YARN_ROPE | {"beta_fast": 20.0, "beta_slow": 2.0},
    "yarn_attention_factor": YARN_ROPE | {"attention_factor": 1.25},
    "yarn_mscale": YARN_ROPE | {"mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn_not_truncated": YARN_ROPE | {"truncate": False},
}


@pytest.mark.parametrize("head_dim", [8, 20, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_transformers(kind: str, head_dim: int, tmp_path: Path) -> None:
    config = LlamaConfig(**SHAPE, head_dim=head_dim, rope_parameters=dict(KINDS[kind]))
    config.save_pretrained(tmp_path)
    table = cos_sin_table(ModelConfig.load(tmp_path).rope, head_dim, 256, torch.device("cpu"))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(256)[None])
    assert table.shape == (256, head_dim)
    assert table.dtype == torch.float32
    half = head_dim // 2
    assert torch.equal(table[:, :half], cos[0, :, :half])
    assert torch.equal(table[:, half:], sin[0, :, :half])
