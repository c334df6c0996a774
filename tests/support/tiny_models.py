"""Small models with random weights of every family that the decoder runs, made and saved by transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

PreTrainedModel = Any  # transformers' own types do not fit together

VOCABULARY = 397

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 150,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGS: Mapping[str, Callable[[], Any]] = {
    "llama2": lambda: LlamaConfig(**SHAPE | {"num_key_value_heads": 8}, rope_parameters=DEFAULT_ROPE),
    "llama3": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama_linear": lambda: LlamaConfig(**SHAPE, rope_parameters=LINEAR_ROPE),
    "llama_dynamic": lambda: LlamaConfig(**SHAPE, rope_parameters=DYNAMIC_ROPE),
    "llama_yarn": lambda: LlamaConfig(**SHAPE, rope_parameters=YARN_ROPE),
    "llama_biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, head_dim=20),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=None),
    "mistral_window": lambda: MistralConfig(**SHAPE, sliding_window=11, head_dim=24),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2_window": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=13, max_window_layers=1, rope_parameters=YARN_ROPE
    ),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=24, tie_word_embeddings=True),
    "qwen3_window": lambda: Qwen3Config(
        **SHAPE,
        head_dim=16,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE | {"head_dim": 24, "num_experts": 8},
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        norm_topk_prob=True,
    ),
    "qwen3_moe_mixed": lambda: Qwen3MoeConfig(
        **SHAPE | {"head_dim": 16, "num_experts": 5},
        num_experts_per_tok=2,
        moe_intermediate_size=36,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=12,
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model `name` of CONFIGS with weights large enough that its greedy tokens have clear winners."""
    return make_of(CONFIGS[name](), dtype)


def make_of(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a configuration of transformers, with such weights."""
    config.pad_token_id, config.bos_token_id, config.eos_token_id = None, 1, 2
    auto: Any = transformers.AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)  # norms around 1, biases around 0
            else:
                parameter.copy_(noise * (1.6 / parameter.shape[1] ** 0.5))
    return model.to(dtype)


def save(name: str, directory: Path, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB") -> Path:
    """Write the model `name` as a Hugging Face directory."""
    make(name, dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return directory


def shared_data() -> Path:
    """The folder of data that is shared between checkouts and not part of the product; skips where it is absent."""
    root = Path(__file__).resolve().parents[2]
    data = Path(os.environ.get("AIEXPORT_TEST_DATA", root.parent / "shared" / "data"))
    if not data.is_dir():
        pytest.skip(f"test data not found at {data}; set AIEXPORT_TEST_DATA")
    return data


def prompts(lengths: list[int], vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Distinct random prompts of the given lengths."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """What transformers generates greedily: its ids, and the float32 logits [num_tokens, vocabulary] behind them."""
    output = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).float()
