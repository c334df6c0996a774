"""Quantized checkpoints: logits beside transformers with the dequantized weights; everything else refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import quantized_models
from support.decoding import logits_of
from support.quantized_models import GROUP, Tensors, awq, fp8, gptq, save, save_compressed

from aiexport_edge.engine.models.config import ModelConfig, ModelError
from aiexport_edge.engine.models.loader import LoadedModel, load_model
from aiexport_edge.kernels import linear

# |logits - expected| / |expected|. Weights that are decoded into float32 give the same but for the order of sums;
# products in four bits round their rows to int8, and in a mixture that may choose another expert.
EXACT, ROUNDED_ROWS, OTHER_EXPERTS = 1e-5, 0.04, 0.15

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
HEAD, ROUTER = "lm_head", "mlp.gate"


def error_of(model: LoadedModel, expected: Any) -> float:
    ids = torch.randint(3, 397, (40,), generator=torch.Generator().manual_seed(3))
    logits = logits_of(model, ids)
    with torch.no_grad():
        wanted = expected(ids[None]).logits[0].float()
    return float((logits - wanted).norm() / wanted.norm())


def check(directory: Path, expected: Any, tolerance: float = EXACT) -> None:
    """With the weights decoded into float32, and as they are served."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_pack_bits", lambda *arguments, **options: None)
        assert error_of(load_model(directory, dtype="float32"), expected) <= EXACT
    assert error_of(load_model(directory, dtype="float32"), expected) <= tolerance


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_fp8_in_blocks(family: str, tmp_path: Path) -> None:
    """As Qwen's and DeepSeek's releases; transformers reads the very same directory."""
    block = (GROUP, GROUP)
    spared = (HEAD, ROUTER, "layers.1.mlp.down_proj")
    config = FP8 | {"weight_block_size": list(block), "modules_to_not_convert": ["lm_head", "gate", spared[2]]}
    expected = save(
        family, tmp_path / "model", config, partial(fp8, block=block, scale_name="weight_scale_inv"), spared
    )
    check(tmp_path / "model", expected)


def test_fp8_as_transformers_reads_it(tmp_path: Path) -> None:
    import transformers

    block = (16, 16)  # transformers wants weights of whole blocks
    config = FP8 | {"weight_block_size": list(block), "modules_to_not_convert": ["lm_head"]}
    save("qwen3", tmp_path / "model", config, partial(fp8, block=block, scale_name="weight_scale_inv"), (HEAD,))
    auto: Any = transformers.AutoModelForCausalLM
    expected = auto.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    check(tmp_path / "model", expected)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_per_tensor_with_scales_of_activations(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Static scales of activations are not needed: they are measured as they come."""

    def pack(weight: torch.Tensor) -> Any:
        stored, wide = fp8(weight, (weight.shape[0], weight.shape[1]), "weight_scale", shape)
        return stored | {"input_scale": torch.tensor(0.01)}, wide

    expected = save("llama", tmp_path / "model", FP8 | {"activation_scheme": "static"}, pack, (HEAD,))
    check(tmp_path / "model", expected)


def test_fp8_per_output(tmp_path: Path) -> None:
    """As Llama's releases."""
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}

    def pack(weight: torch.Tensor) -> Any:
        return fp8(weight, (1, weight.shape[1]), "weight_scale")

    check(tmp_path / "model", save("llama", tmp_path / "model", config, pack, (HEAD,)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_awq(family: str, tmp_path: Path) -> None:
    check(tmp_path / "model", save(family, tmp_path / "model", AWQ, awq, (HEAD, ROUTER)), OTHER_EXPERTS)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_gptq(version: int, act_order: bool, symmetric: bool, tmp_path: Path) -> None:
    config = GPTQ | {"sym": symmetric, "desc_act": act_order}
    config["checkpoint_format"] = "gptq" if version == 1 else "gptq_v2"
    pack = gptq(symmetric=symmetric, act_order=act_order, version=version, bias=version == 1)
    expected = save("qwen3", tmp_path / "model", config, pack, (HEAD,))
    check(tmp_path / "model", expected, ROUNDED_ROWS)


def test_gptq_of_a_mixture(tmp_path: Path) -> None:
    pack = gptq(symmetric=True, act_order=True, version=1)
    check(tmp_path / "model", save("qwen3_moe", tmp_path / "model", GPTQ, pack, (HEAD, ROUTER)), OTHER_EXPERTS)


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
INT = {"num_bits": 4, "type": "int"}


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        (FLOAT | {"strategy": "tensor"}, EXACT),
        (FLOAT | {"strategy": "channel"}, EXACT),
        (FLOAT | {"strategy": "block", "block_structure": [GROUP, GROUP]}, EXACT),
        (INT | {"strategy": "group", "group_size": GROUP, "symmetric": True}, ROUNDED_ROWS),
        (INT | {"strategy": "group", "group_size": GROUP, "symmetric": False}, ROUNDED_ROWS),
        (INT | {"strategy": "channel", "symmetric": True}, ROUNDED_ROWS),
    ],
    ids=["fp8 tensor", "fp8 channel", "fp8 block", "int4 symmetric", "int4 asymmetric", "int4 channel"],
)
def test_compressed_tensors(arguments: dict[str, Any], tolerance: float, tmp_path: Path) -> None:
    """Written and dequantized by that library."""
    expected = save_compressed("llama", tmp_path / "model", arguments, ignore=["lm_head", "re:.*layers.0.mlp.up_proj"])
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32
    assert "model.layers.0.mlp.gate_proj.weight_scale" in stored
    check(tmp_path / "model", expected, tolerance)


def test_bfloat16_is_served_too(tmp_path: Path) -> None:
    expected = save("llama", tmp_path / "model", AWQ, awq, (HEAD,))
    ids = torch.arange(3, 43)
    logits = logits_of(load_model(tmp_path / "model", dtype="auto"), ids)
    with torch.no_grad():
        wanted = expected(ids[None]).logits[0]
    assert (logits - wanted).norm() <= 0.03 * wanted.norm()


# --- Refusals ---


def edit(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method is 'bitsandbytes'; supported are"),
        ({"quant_method": "mxfp4"}, "take the 16-bit checkpoint"),
        ({}, "quant_method is None"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'"),
        (AWQ | {"bits": 8}, "bits is 8"),
        (AWQ | {"zero_point": False}, "zero_point is False"),
        (AWQ | {"group_size": 0}, "group_size is 0"),
        (GPTQ | {"bits": 3}, "bits is 3; supported is 4 or 8"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"dynamic": {"+:mlp": {"bits": 2}}}, "dynamic.+:mlp.bits is 2"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"}, "packing_format is"),
        ({"quant_method": "auto-round", "act_bits": 8}, "act_bits is 8"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "data_type is 'mx_fp'"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is"),
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
    ],
)
def test_other_methods_are_refused(quantization: dict[str, Any], message: str, tmp_path: Path) -> None:
    quantized_models.CONFIGS["llama"]().save_pretrained(tmp_path)
    quantized_models.set_quantization(tmp_path, quantization)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config.json: quantization_config") as caught:
        ModelConfig.load(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("form", "weights", "activations", "message"),
    [
        ("int-quantized", {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}, "num_bits is 4"),
        ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": False}, None, "symmetric is False"),
        ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float"}, None, "format is 'nvfp4-pack-quantized'"),
        ("pack-quantized", {"num_bits": 3, "type": "int"}, None, "num_bits is 3"),
        ("pack-quantized", {"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "int"}, "input_activations is set"),
        ("float-quantized", {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}, "type is 'int'"),
        ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "group"}, None, "strategy is 'group'"),
    ],
)
def test_other_compressed_tensors_are_refused(
    form: str, weights: dict[str, Any], activations: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    quantization = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    test_other_methods_are_refused(quantization, message, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.scales"), "up_proj.scales is missing, though"),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.scales": torch.ones(3, 160)}),
            r"up_proj.scales has shape \[3, 160\], the format asks for \[2, 160\]",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.qzeros": torch.ones(2, 20)}),
            "up_proj.qzeros is F32, the format asks for I32",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.g_idx": torch.zeros(64, dtype=torch.int32)}),
            "up_proj: g_idx does not share out 64 inputs to groups of 32",
        ),
        (
            lambda tensors: tensors["model.layers.1.mlp.up_proj.scales"].fill_(float("nan")),
            "up_proj: scales has numbers that are not finite",
        ),
        (
            lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.bias": torch.ones(160)}),
            "up_proj.bias is not part of LlamaForCausalLM",
        ),
    ],
)
def test_torn_weights_are_refused(change: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    save("llama", tmp_path / "model", GPTQ, gptq(symmetric=True, act_order=False, version=1), (HEAD,))
    edit(tmp_path / "model", change)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "model")


def test_quantized_weights_are_not_rounded_again(tmp_path: Path) -> None:
    save("llama", tmp_path / "model", AWQ, awq, (HEAD,))
    with pytest.raises(ModelError, match="quantized already; leave out quantize"):
        load_model(tmp_path / "model", quantize="int8")


def test_gguf_is_refused(tmp_path: Path) -> None:
    quantized_models.make("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.gguf")
    with pytest.raises(ModelError, match="holds weights as GGUF only"):
        load_model(tmp_path)
