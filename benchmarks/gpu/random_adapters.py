"""Adapters with random factors on every product of a model, as PEFT directories."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from aiexport_edge.engine.adapters.peft import CONFIG, PLACES, WEIGHTS, product_sizes, read_adapter
from aiexport_edge.engine.core.protocol import AdapterRef
from aiexport_edge.engine.models.config import ModelConfig


def write_adapter(directory: Path, model: ModelConfig, *, rank: int, seed: int) -> AdapterRef:
    """Writes one; what a request names."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(model.num_layers):
        for product in PLACES:
            outputs, inputs = product_sizes(model, product)
            name = f"base_model.model.model.layers.{layer}.{product}"
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs, rank, generator=generator) / rank
            tensors |= {f"{name}.lora_A.weight": a.bfloat16(), f"{name}.lora_B.weight": b.bfloat16()}
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return AdapterRef(str(directory), read_adapter(directory, model).digest)
