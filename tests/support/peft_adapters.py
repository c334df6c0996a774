"""Adapters as PEFT itself makes and writes them, with random factors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

ALL_PRODUCTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base: Any, directory: Path, *, seed: int = 0, size: float = 0.1, **config: Any) -> Any:
    """Writes an adapter of `base` into `directory`; returns PEFT's model, whose `unload` gives `base` back.

    `size` is the factors' standard deviation; `config` is of PEFT's LoraConfig.
    """
    arguments: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL_PRODUCTS} | config
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, at what PEFT asks it, and of PEFT, at rare arguments
        adapted = get_peft_model(base, LoraConfig(**arguments))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, size, generator=generator)
        adapted.save_pretrained(str(directory))
    return adapted


def load_adapter(base: Any, directory: Path) -> Any:
    """PEFT's model of `base` with the adapter in `directory`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, str(directory))
