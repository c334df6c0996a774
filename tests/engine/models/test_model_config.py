"""Reading config.json: both layouts of transformers, and a named refusal of whatever is not supported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import CONFIGS

from aiexport_edge.engine.models.config import ModelConfig, ModelError, Yarn

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 100,
    "max_position_embeddings": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "vocab_size": 320,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}
GONE = object()


def load(directory: Path, config: dict[str, Any], **changes: Any) -> ModelConfig:
    values = {key: value for key, value in (config | changes).items() if value is not GONE}
    (directory / "config.json").write_text(json.dumps(values))
    return ModelConfig.load(directory)


def test_llama(tmp_path: Path) -> None:
    config = load(tmp_path, LLAMA)
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads, config.head_dim) == (4, 8, 2, 8)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False, False, False, False)
    assert (config.dtype, config.context_window, config.stop_ids) == ("bfloat16", 512, (2,))
    assert config.rope.kind == "default"
    assert config.rope.theta == 10000.0
    assert config.sliding_windows == (0, 0, 0, 0)
    assert config.kv_bytes_per_token(2) == 4 * 2 * 2 * 8 * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_writes_is_read(name: str, tmp_path: Path) -> None:
    expected = CONFIGS[name]()
    expected.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": None}))  # the model type is enough
    config = ModelConfig.load(tmp_path)
    assert config.num_q_heads == expected.num_attention_heads
    assert config.num_kv_heads == expected.num_key_value_heads
    assert config.head_dim == getattr(expected, "head_dim", None) or 64 // 8
    assert config.tie_word_embeddings == expected.tie_word_embeddings
    assert config.rope.kind == expected.rope_parameters["rope_type"]
    assert config.rope.theta == expected.rope_parameters["rope_theta"]
    assert config.rms_norm_eps == expected.rms_norm_eps


def test_both_layouts_of_rope_say_the_same(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    new = load(tmp_path, LLAMA, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    old = load(tmp_path, LLAMA, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    oldest = load(tmp_path, LLAMA, rope_theta=5e5, rope_scaling={"type": "llama3", **scaling})
    assert new.rope == old.rope == oldest.rope
    assert new.rope.theta == 5e5
    assert new.rope.factor == 8.0
    outside = load(
        tmp_path,
        LLAMA,
        rope_parameters={"rope_type": "llama3", **scaling},
        original_max_position_embeddings=64,
    )
    assert outside.rope.original_max_position_embeddings == 64


def test_yarn_extends_the_context(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert load(tmp_path, QWEN2, rope_scaling=yarn).context_window == 2048
    assert load(tmp_path, QWEN2, rope_scaling=yarn, max_position_embeddings=4096).context_window == 4096
    assert load(tmp_path, QWEN2, rope_scaling={"type": "linear", "factor": 2.0}).context_window == 512


def test_families_differ_in_biases_and_norms(tmp_path: Path) -> None:
    qwen2 = load(tmp_path, QWEN2)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = load(tmp_path, QWEN3, attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (True, True, True, 16)
    llama = load(tmp_path, LLAMA, attention_bias=True, mlp_bias=True, num_key_value_heads=GONE)
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.num_kv_heads) == (True, True, True, 8)
    assert load(tmp_path, MISTRAL, attention_bias=True).qkv_bias is False


def test_sliding_windows(tmp_path: Path) -> None:
    assert load(tmp_path, MISTRAL, sliding_window=None).sliding_windows == (0,) * 4
    assert load(tmp_path, MISTRAL, sliding_window=100).sliding_windows == (100,) * 4
    assert load(tmp_path, MISTRAL).sliding_windows == (4096,) * 4
    window = {"sliding_window": 32, "max_window_layers": 3}
    assert load(tmp_path, QWEN2, **window).sliding_windows == (0,) * 4
    assert load(tmp_path, QWEN2, **window, use_sliding_window=False).sliding_windows == (0,) * 4
    assert load(tmp_path, QWEN2, **window, use_sliding_window=True).sliding_windows == (0, 0, 0, 32)
    types = ["sliding_attention", "full_attention"] * 2
    assert load(tmp_path, QWEN3, **window, use_sliding_window=True, layer_types=types).sliding_windows == (32, 0, 32, 0)
    assert load(tmp_path, QWEN3, **window, layer_types=["full_attention"] * 4).sliding_windows == (0,) * 4


def test_windows_of_mixtures_are_in_all_layers(tmp_path: Path) -> None:
    window = {"sliding_window": 32, "max_window_layers": 3}
    assert load(tmp_path, QWEN3_MOE, **window).sliding_windows == (0,) * 4
    assert load(tmp_path, QWEN3_MOE, **window, use_sliding_window=True).sliding_windows == (32,) * 4


def test_a_head_of_mixtures_follows_from_the_other_sizes(tmp_path: Path) -> None:
    assert load(tmp_path, QWEN3_MOE).head_dim == 64 // 8
    assert load(tmp_path, QWEN3_MOE, head_dim=24).head_dim == 24


def test_both_layouts_of_rope_beside_each_other(tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 512}
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **yarn}}
    config = load(tmp_path, LLAMA, **new, rope_scaling={"type": "yarn", **yarn}, rope_theta=1e6)
    assert config.rope == load(tmp_path, LLAMA, **new).rope
    assert load(tmp_path, LLAMA, **new, rope_scaling={}).rope == config.rope
    operators = ModelConfig.load(tmp_path, yarn=Yarn(2.0, 256))
    assert (operators.rope.factor, operators.rope.theta) == (2.0, 1e6)
    for other in ({"type": "linear", "factor": 4.0}, {"type": "yarn", **yarn, "rope_theta": 1e4}):
        with pytest.raises(ModelError, match="rope_scaling and rope_parameters say different things"):
            load(tmp_path, LLAMA, **new, rope_scaling=other)


def test_dtype_in_either_key(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, torch_dtype=GONE, dtype="float16").dtype == "float16"
    assert load(tmp_path, LLAMA, torch_dtype="torch.float32").dtype == "float32"
    assert load(tmp_path, LLAMA, torch_dtype=GONE).dtype is None


def test_nested_text_config(tmp_path: Path) -> None:
    config = load(tmp_path, {"architectures": ["Qwen3ForCausalLM"], "text_config": QWEN3 | {"hidden_size": 128}})
    assert config.hidden_size == 128


def test_stop_ids(tmp_path: Path) -> None:
    assert load(tmp_path, LLAMA, eos_token_id=GONE).stop_ids == ()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6, 5]}')
    assert load(tmp_path, LLAMA).stop_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load(tmp_path, LLAMA).stop_ids == (7,)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load(tmp_path, LLAMA).stop_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ModelError, match="eos_token_id"):
        load(tmp_path, LLAMA)


@pytest.mark.parametrize(
    ("base", "changes", "complaint"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are Llama"),
        (LLAMA, {"architectures": GONE, "model_type": "gpt2"}, "architecture gpt2 is not supported"),
        (LLAMA, {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'; a list"),
        (LLAMA, {"hidden_size": GONE}, "hidden_size is missing"),
        (LLAMA, {"vocab_size": "many"}, "vocab_size is 'many'; an integer of at least 1"),
        (LLAMA, {"num_hidden_layers": True}, "num_hidden_layers is True"),
        (LLAMA, {"intermediate_size": 0}, "intermediate_size is 0"),
        (LLAMA, {"rms_norm_eps": GONE}, "rms_norm_eps is missing"),
        (LLAMA, {"rms_norm_eps": -1}, "rms_norm_eps is -1; a positive number"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported are silu"),
        (LLAMA, {"is_causal": False}, "is_causal is false"),
        (MISTRAL, {"model_type": "llama"}, "model_type is 'llama', but that of MistralForCausalLM is 'mistral'"),
        (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads is 8, not a multiple of num_key_value_heads 3"),
        (LLAMA, {"head_dim": 7}, "head_dim is 7"),
        (LLAMA, {"torch_dtype": "int8"}, "torch_dtype is 'int8'; supported are float32"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quant_method is 'bitsandbytes'; supported are",
        ),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        (LLAMA, {"rope_scaling": {"type": "longrope"}}, "rope_scaling.type is 'longrope'; supported are default"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_parameters.low_freq_factor is miss"),
        (
            LLAMA,
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            "rope_scaling.high_freq_factor is 1.0; more than",
        ),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs by layer type"),
        (LLAMA, {"rope_scaling": {"type": "default", "mrope_section": [1, 2, 3]}}, "rope_scaling.mrope_section"),
        (LLAMA, {"rope_scaling": "linear"}, "rope_scaling is 'linear'; an object"),
        (QWEN2, {"num_key_value_heads": GONE}, "num_key_value_heads is missing"),
        (QWEN3, {"head_dim": GONE}, "head_dim is missing"),
        (QWEN3, {"layer_types": ["full_attention"]}, "layer_types is not a list of 4"),
        (QWEN3, {"layer_types": ["linear_attention"] * 4}, "layer_types is not a list of 4 of full_attention"),
        (QWEN3, {"layer_types": ["sliding_attention"] * 4}, "but use_sliding_window is not true"),
        (MISTRAL, {"layer_types": ["full_attention"] * 4}, "layer_types has full_attention"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 4}, "layer_types has sliding_attention"),
        (QWEN3_MOE, {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, more than the 4 experts"),
    ],
)
def test_refusals_name_the_file_the_key_and_what_is_supported(
    base: dict[str, Any], changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        load(tmp_path, base, **changes)
    assert complaint in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_no_config_or_not_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        ModelConfig.load(tmp_path)
    for text, complaint in (("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=complaint):
            ModelConfig.load(tmp_path)


def test_no_torch_is_imported() -> None:
    """The engine process reads configurations and must start without it."""
    code = (
        "import sys, aiexport_edge.engine.models.config, aiexport_edge.engine.models.revision;"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
