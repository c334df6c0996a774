"""The architectures that the decoder runs, and what the code of each fixes without its config.json saying so.

Owns the differences between families as data: a new family with the same math is a row here. Knows no tensors.
Values follow transformers' configuration and modeling files of each family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture, which a config.json may name by its `model_type` alone.

    A bias is fixed (True, False) or named by the configuration key that decides it. `windowed` says whether layers
    may attend to a sliding window: "no", "all" (every layer, where `sliding_window` is set), "all if used" (the same,
    where `use_sliding_window` is set too) or "some" (`layer_types`, else the layers from `max_window_layers` on where
    `use_sliding_window` is set). `defaults` are the values that transformers assumes for keys that older directories of
    this family leave out; any other missing key is an error. None stands for what follows from the other sizes.
    """

    model_type: str
    qkv_bias: bool | str
    o_bias: bool | str
    mlp_bias: bool | str
    qk_norm: bool
    windowed: str
    mixture: bool = False  # layers may be mixtures of experts
    vision: bool = False  # pictures stand in its prompts
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        model_type="llama",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        qk_norm=False,
        windowed="no",
        defaults={"num_key_value_heads": None},
    ),
    "MistralForCausalLM": Family(
        model_type="mistral",
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windowed="all",
        defaults={"sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        model_type="qwen2",
        qkv_bias=True,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        windowed="some",
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "Qwen3ForCausalLM": Family(
        model_type="qwen3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias=False,
        qk_norm=True,
        windowed="some",
        defaults={"sliding_window": 4096, "max_window_layers": 28},
    ),
    "Qwen3MoeForCausalLM": Family(
        model_type="qwen3_moe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias=False,
        qk_norm=True,
        windowed="all if used",
        mixture=True,
        defaults={"sliding_window": 4096, "head_dim": None},
    ),
    "Qwen3VLForConditionalGeneration": Family(
        model_type="qwen3_vl",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias=False,
        qk_norm=True,
        windowed="no",
        vision=True,
    ),
    "Qwen3VLMoeForConditionalGeneration": Family(
        model_type="qwen3_vl_moe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias=False,
        qk_norm=True,
        windowed="no",
        mixture=True,
        vision=True,
        defaults={"norm_topk_prob": True, "head_dim": None},
    ),
}
