"""Adapter directories: what PEFT itself writes is read as PEFT means it; whatever does not fit is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.peft_adapters import save_adapter
from transformers import Qwen3Config, Qwen3ForCausalLM

from aiexport_edge.engine.adapters.peft import CONFIG, PLACES, WEIGHTS, AdapterError, read_adapter
from aiexport_edge.engine.models.config import ModelConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3ForCausalLM, ModelConfig]:
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    model.save_pretrained(directory)
    return model, ModelConfig.load(directory)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\.self_attn\.[qv]_proj"},
        {"layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"layers.0.*": 3, "o_proj": 5}},
    ],
    ids=str,
)
def test_what_peft_writes(base: tuple[Qwen3ForCausalLM, ModelConfig], tmp_path: Path, config: dict[str, Any]) -> None:
    """Every factor that PEFT has, in its place, with PEFT's own scale."""
    model, shape = base
    adapted = save_adapter(model, tmp_path, **config)
    try:
        modules = {
            name.removeprefix("base_model.model."): module
            for name, module in adapted.named_modules()
            if getattr(module, "lora_A", None)
        }
        adapter = read_adapter(tmp_path, shape)
        assert len(adapter.factors) == len(modules)
        tensors = load_file(tmp_path / WEIGHTS)
        places = {place: product for product, place in PLACES.items()}
        for factors in adapter.factors:
            product = places[factors.product, factors.part]
            module = modules[f"model.layers.{factors.layer}.{product}"]
            assert factors.scale == pytest.approx(module.scaling["default"])
            assert factors.rank == module.r["default"]
            np.testing.assert_array_equal(tensors[factors.a], module.lora_A["default"].weight.detach().numpy())
            np.testing.assert_array_equal(tensors[factors.b], module.lora_B["default"].weight.detach().numpy())
        assert adapter.rank == max(module.r["default"] for module in modules.values())
    finally:
        adapted.unload()


@pytest.fixture
def directory(base: tuple[Qwen3ForCausalLM, ModelConfig], tmp_path: Path) -> Path:
    save_adapter(base[0], tmp_path).unload()
    return tmp_path


def change(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' takes parts out of the model"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 0}, "r must be"),
        ({"r": 3}, "rank 4"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(
    base: tuple[Qwen3ForCausalLM, ModelConfig], directory: Path, values: dict[str, Any], named: str
) -> None:
    change(directory, **values)
    with pytest.raises(AdapterError, match=named):
        read_adapter(directory, base[1])


PREFIX = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"base_model.model.lm_head.lora_A.weight": (4, 32)}, "the embeddings or the head"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (4, 64)}, "the embeddings or the head"),
        ({PREFIX + "mlp.experts.0.up_proj.lora_A.weight": (4, 32)}, "experts"),
        ({PREFIX + "self_attn.q_norm.lora_A.weight": (4, 32)}, "is not a factor"),
        ({PREFIX + "self_attn.q_proj.lora_A.weight": (4, 33)}, r"\[4, 33\]"),
        ({PREFIX + "self_attn.q_proj.lora_B.weight": (64, 5)}, r"\[64, 5\]"),
        ({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": (4, 32)}, "must have one"),
        (
            {
                "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": (4, 32),
                "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": (64, 4),
            },
            "layer 7",
        ),
        (
            {
                "base_model.model.model.visual.layers.0.self_attn.q_proj.lora_A.weight": (4, 32),
                "base_model.model.model.visual.layers.0.self_attn.q_proj.lora_B.weight": (64, 4),
            },
            "must have one|vision",
        ),
    ],
    ids=str,
)
def test_factors_that_are_refused(
    base: tuple[Qwen3ForCausalLM, ModelConfig], directory: Path, tensors: dict[str, tuple[int, ...]], named: str
) -> None:
    held = load_file(directory / WEIGHTS)
    save_file(held | {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, directory / WEIGHTS)
    with pytest.raises(AdapterError, match=named):
        read_adapter(directory, base[1])


def test_a_factor_without_its_partner(base: tuple[Qwen3ForCausalLM, ModelConfig], directory: Path) -> None:
    held = load_file(directory / WEIGHTS)
    del held[PREFIX + "self_attn.q_proj.lora_B.weight"]
    save_file(held, directory / WEIGHTS)
    with pytest.raises(AdapterError, match="q_proj must have one lora_A and one lora_B"):
        read_adapter(directory, base[1])


def test_files_that_are_refused(base: tuple[Qwen3ForCausalLM, ModelConfig], directory: Path) -> None:
    shape = base[1]
    with pytest.raises(AdapterError, match="more than 2"):
        read_adapter(directory, shape, max_rank=2)
    save_file({"a": np.zeros(3, np.int64)}, directory / WEIGHTS)
    with pytest.raises(AdapterError, match="I64"):
        read_adapter(directory, shape)
    save_file({}, directory / WEIGHTS)
    with pytest.raises(AdapterError, match="no factors"):
        read_adapter(directory, shape)
    for content in (b"", b"PK\x03\x04", struct.pack("<Q", 1 << 60) + b"{}"):
        (directory / WEIGHTS).write_bytes(content)
        with pytest.raises(AdapterError, match="safetensors"):
            read_adapter(directory, shape)
    (directory / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match="does not exist"):
        read_adapter(directory, shape)
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="pickled"):
        read_adapter(directory, shape)
    (directory / CONFIG).write_text("[]")
    with pytest.raises(AdapterError, match="not a JSON object"):
        read_adapter(directory, shape)
    (directory / CONFIG).write_text("{")
    with pytest.raises(AdapterError, match="JSON"):
        read_adapter(directory, shape)
    (directory / CONFIG).unlink()
    with pytest.raises(AdapterError, match="save_pretrained"):
        read_adapter(directory, shape)


def test_the_digest_is_of_the_content(base: tuple[Qwen3ForCausalLM, ModelConfig], directory: Path) -> None:
    shape = base[1]
    first = read_adapter(directory, shape).digest
    assert read_adapter(directory, shape).digest == first
    change(directory, lora_alpha=9)
    second = read_adapter(directory, shape).digest
    held = load_file(directory / WEIGHTS)
    next(iter(held.values()))[0, 0] += 1
    save_file(held, directory / WEIGHTS)
    assert len({first, second, read_adapter(directory, shape).digest}) == 3
