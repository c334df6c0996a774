"""The estimate of what adapters take is what their tables take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import save

from aiexport_edge.engine.models.adapter_tables import empty_layers
from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.engine.models.memory import Served, adapter_bytes


@pytest.mark.parametrize("family", ["qwen3", "llama2", "qwen3_moe_mixed"])
def test_as_estimated(family: str, tmp_path: Path) -> None:
    config = ModelConfig.load(save(family, tmp_path))
    layers = empty_layers(config, num_slots=3, max_rank=20, dtype=torch.bfloat16, device=torch.device("meta"))
    tables = [table for layer in layers for table in layer.by_product().values()]
    assert adapter_bytes(Served("m", config, "none", 64), 3, 20) == sum(t.a.nbytes + t.b.nbytes for t in tables)
