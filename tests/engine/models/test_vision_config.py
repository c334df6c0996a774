"""Qwen3-VL's directories: both layouts of config.json, both orders of fused experts, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_vision import save_vision

from aiexport_edge.engine.models.config import ModelConfig, ModelError
from aiexport_edge.engine.models.decoder import MixtureOfExperts
from aiexport_edge.engine.models.loader import load_model
from aiexport_edge.engine.models.tensor_names import expected_shapes

# As the 4B model was released, for transformers 4.57.
RELEASED: dict[str, Any] = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
MIXTURE = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def load(directory: Path, raw: dict[str, Any], *, text: Any = None, vision: Any = None, **changes: Any) -> ModelConfig:
    values = raw | changes
    values["text_config"] = values["text_config"] | (text or {})
    values["vision_config"] = values["vision_config"] | (vision or {})
    (directory / "config.json").write_text(json.dumps(values))
    return ModelConfig.load(directory)


def test_as_released(tmp_path: Path) -> None:
    config = load(tmp_path, RELEASED)
    assert (config.num_layers, config.hidden_size, config.head_dim, config.qk_norm) == (36, 2560, 128, True)
    assert (config.tie_word_embeddings, config.dtype, config.stop_ids) == (True, "bfloat16", (151645,))
    assert (config.context_window, config.rope.theta) == (262144, 5e6)
    assert config.rope.mrope_section == (24, 20, 20)
    vision = config.vision
    assert vision is not None
    assert (vision.image_token_id, vision.vision_start_id, vision.vision_end_id) == (151655, 151652, 151653)
    assert (vision.patch_size, vision.merge_size, vision.deepstack_layers) == (16, 2, (5, 11, 17))
    assert vision.num_tokens((64, 48)) == 768
    shapes = expected_shapes(config)
    assert shapes["model.language_model.layers.35.mlp.down_proj.weight"] == (2560, 9728)
    assert shapes["model.visual.patch_embed.proj.weight"] == (1024, 3, 2, 16, 16)
    assert "lm_head.weight" not in shapes
    # 4,437,815,808 parameters, as the model's page has it.
    total = 0
    for shape in shapes.values():
        total += int(torch.Size(shape).numel())
    assert total == 4_437_815_808


def test_a_mixture(tmp_path: Path) -> None:
    raw = RELEASED | {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    config = load(tmp_path, raw, text=MIXTURE | {"tie_word_embeddings": True}, tie_word_embeddings=False)
    assert not config.tie_word_embeddings  # the whole model's word goes before its part's
    assert config.mixture is not None
    assert (config.mixture.num_experts, config.mixture.top_k, config.mixture.normalize) == (128, 8, True)
    shapes = expected_shapes(config)
    assert shapes["model.language_model.layers.0.mlp.experts.gate_up_proj"] == (128, 1536, 2560)
    assert shapes["lm_head.weight"] == (151936, 2560)


def test_sections_of_axes_need_not_fill_the_head(tmp_path: Path) -> None:
    config = load(tmp_path, RELEASED, text={"head_dim": 8, "rope_scaling": {"mrope_section": [16, 8, 8]}})
    assert config.rope.mrope_section == (16, 8, 8)


def test_the_model_type_is_enough(tmp_path: Path) -> None:
    assert load(tmp_path, RELEASED | {"architectures": None}).vision is not None


def test_a_longer_context_by_yarn_keeps_its_axes(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 262144,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    config = load(tmp_path, RELEASED, text={"rope_scaling": scaling})
    assert (config.rope.kind, config.rope.mrope_section) == ("yarn", (24, 20, 20))
    assert config.context_window == 3 * 262144


@pytest.mark.parametrize(
    ("text", "vision", "changes", "message"),
    [
        ({"rope_scaling": {"mrope_section": [24, 20]}}, {}, {}, "rope_scaling.mrope_section is .24, 20.; three sizes"),
        ({"rope_scaling": {"mrope_section": [24, 20, -1]}}, {}, {}, "is .24, 20, -1.; three sizes are needed"),
        (
            {"rope_scaling": {"mrope_section": [24, 20, 20], "mrope_interleaved": False}},
            {},
            {},
            "mrope_interleaved is false",
        ),
        ({"rope_theta": None}, {}, {}, "rope_theta is missing"),
        ({}, {"rope_parameters": {"rope_type": "linear"}}, {}, "vision_config.rope_parameters.rope_type is 'linear'"),
        (
            MIXTURE | {"norm_topk_prob": False},
            {},
            {"architectures": None, "model_type": "qwen3_vl_moe"},
            "norm_topk_prob is false",
        ),
        ({}, {"hidden_act": "quick_gelu"}, {}, "vision_config.hidden_act is 'quick_gelu'; supported are"),
        ({}, {"deepstack_visual_indexes": [5, 24]}, {}, "vision_config.deepstack_visual_indexes is .5, 24.; a list"),
        ({}, {"deepstack_visual_indexes": [11, 5]}, {}, "ascending layers, fewer than 36"),
        ({}, {"out_hidden_size": 3584}, {}, "out_hidden_size is 3584; the decoder's hidden_size is 2560"),
        ({}, {"num_position_embeddings": 2300}, {}, "square of a grid's side"),
        ({}, {"num_heads": 24}, {}, "vision_config.hidden_size is 1024; a multiple of 4"),
        ({}, {}, {"image_token_id": 151936}, "image_token_id is 151936; the vocabulary has 151936"),
        ({}, {}, {"vision_start_token_id": None}, "vision_start_token_id is missing"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, text: Any, vision: Any, changes: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(tmp_path, RELEASED, text=text, vision=vision, **changes)


def test_without_a_vision_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in RELEASED.items() if k != "vision_config"}))
    with pytest.raises(ModelError, match="vision_config is missing"):
        ModelConfig.load(tmp_path)


@torch.inference_mode()
def test_fused_experts_in_either_order_are_the_same(tmp_path: Path) -> None:
    outputs = []
    for released_layout in (True, False):
        directory = save_vision("qwen3_vl_moe", tmp_path / str(released_layout), released_layout=released_layout)
        mlp = load_model(directory, dtype="float32").decoder.layers[1].mlp
        assert isinstance(mlp, MixtureOfExperts)
        outputs.append(mlp(torch.linspace(-1, 1, 5 * 64).view(5, 64)))
    assert torch.equal(*outputs)


def test_a_tower_that_lacks_a_tensor_or_its_preprocessor(tmp_path: Path) -> None:
    directory = save_vision("qwen3_vl", tmp_path)
    preprocessor = (directory / "preprocessor_config.json").read_text()
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json does not exist"):
        load_model(directory)
    (directory / "preprocessor_config.json").write_text(preprocessor)
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["depth"] = 4
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.visual\.blocks\.3\.attn\.proj"):
        load_model(directory)
