"""Small quantized checkpoints by the public tools themselves: `python quantization_tools.py CASE DIRECTORY [MODEL]`.

Run by an interpreter that has the case's tool (`CASES`); needs nothing of this repository. Makes a model with random
weights, or takes the one in MODEL, lets the tool quantize and save it, and has the tool dequantize what it saved.
DIRECTORY gets the checkpoint as the tool wrote it, `expected.safetensors` (ids int64 [T]; logits float32 [T, V] of the
dequantized weights, by transformers in float32) and `made_by.json` (the tool, its version, the case).

What is quantized are weights: activations, which some schemes round besides, are left as they are.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LETTERS = [chr(code) for code in range(32, 127)]
TEXTS = [
    f"The {size} {animal} went to the {place}, and {number} others came with it; then it slept." * 3
    for size in ("big", "little", "old", "quick")
    for animal in ("cat", "horse", "bird")
    for number, place in enumerate(("river", "house", "end of the road"))
]
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def make_model(family: str, directory: Path) -> None:
    """Random weights whose logits differ enough, and a tokenizer of single letters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    families: dict[str, dict[str, Any]] = {
        "llama": {"tie_word_embeddings": False},
        "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
        "qwen3_moe": {
            "tie_word_embeddings": False,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
        },
    }
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(family, **SHAPE | families[family])).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.2 / parameter.shape[-1] ** 0.5))
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    of_letters: Any = PreTrainedTokenizerFast
    of_letters(tokenizer_object=tokenizer, eos_token="!", bos_token=" ", unk_token=" ").save_pretrained(directory)


def samples(source: Path, number: int = 24, length: int = 64) -> list[list[int]]:
    """Token ids to calibrate with."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    if (source / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        found = [tokenizer.encode(text).ids[:length] for text in TEXTS[:number]]
        return [[each % config.vocab_size for each in ids] for ids in found]
    return [[(13 * row + 7 * place) % config.vocab_size for place in range(length)] for row in range(number)]


def save_expected(source: Path, directory: Path, weights: dict[str, Any]) -> None:
    """The logits of `source`'s model with these weights in the place of its own, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(source, torch_dtype=torch.float32).eval()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if name in parameters:
                parameters[name].copy_(weight.float())
                continue
            # transformers 5 has a mixture's experts as one tensor for all.
            prefix, expert, part = name.removesuffix(".weight").rsplit(".", 2)
            if part == "down_proj":
                parameters[f"{prefix}.down_proj"][int(expert)].copy_(weight.float())
                continue
            rows = parameters[f"{prefix}.gate_up_proj"][int(expert)].chunk(2)
            rows[("gate_proj", "up_proj").index(part)].copy_(weight.float())
    assert weights, "the tool quantized nothing"
    save_logits(model, source, directory)


def save_logits(model: Any, source: Path, directory: Path) -> None:
    import torch
    from safetensors.torch import save_file

    ids = torch.tensor(samples(source, 1, 20)[0])
    with torch.no_grad():
        logits = model(ids[None]).logits[0].float()
    save_file({"ids": ids, "logits": logits.contiguous()}, directory / "expected.safetensors")


# --- llmcompressor, which writes compressed-tensors ---


def llmcompressor(recipe: Callable[[], Any], source: Path, directory: Path) -> None:
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples(source)]
    oneshot(
        model=model, recipe=recipe(), dataset=Dataset.from_list(rows), num_calibration_samples=len(rows),
        max_seq_length=64, pipeline="independent",
    )  # fmt: skip
    model.save_pretrained(directory, save_compressed=True)
    with torch.no_grad():  # decoded weights get the dtype of their scales
        for name, parameter in model.named_parameters():
            if name.endswith("_scale"):
                parameter.data = parameter.data.float()
    ModelCompressor.from_pretrained_model(model).decompress_model(model)
    weights = {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None and getattr(module, "weight", None) is not None
    }
    save_expected(source, directory, weights)
    if any(hasattr(module, "k_scale") for module in model.modules()):
        # Keys and values as the tool rounds them; the products' rows are not.
        linear: Any = torch.nn.Linear
        for module in model.modules():
            if isinstance(module, linear):
                module.quantization_enabled = False
        save_logits(model.float(), source, directory)


def weights_only(scheme: str | None = None, **arguments: Any) -> Any:
    """A recipe that needs no data but for what its scales of keys and values ask."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    own = {} if scheme is None else {"targets": "Linear", "scheme": scheme}
    return QuantizationModifier(**{"ignore": ["lm_head", "re:.*mlp.gate$"]} | own | arguments)


def int_group(**weights: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True} | weights}


def grouped(**weights: Any) -> Any:
    return weights_only(config_groups={"group_0": int_group(**weights)})


def gptq_recipe(**weights: Any) -> Any:
    from llmcompressor.modifiers.quantization import GPTQModifier

    return GPTQModifier(ignore=["lm_head"], config_groups={"group_0": int_group(**weights)})


def several_forms() -> Any:
    """FP8 in attention, four bits and eight in the MLP."""
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    rows = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return weights_only(
        config_groups={
            "group_0": {"targets": ["re:.*self_attn.*_proj$"], "weights": fp8, "input_activations": rows},
            "group_1": {**int_group(strategy="group", group_size=32), "targets": ["re:.*(gate|up)_proj$"]},
            "group_2": {**int_group(strategy="channel", num_bits=8), "targets": ["re:.*down_proj$"]},
        }
    )


KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


# --- auto-round ---


def auto_round(form: str, options: dict[str, Any], source: Path, directory: Path) -> None:
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    own = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", "group_size": 32} | options
    tool = AutoRound(model, tokenizer, **own)
    with tempfile.TemporaryDirectory() as scratch:
        tool.quantize_and_save(scratch, format=form)
        found = next(Path(scratch).rglob("config.json")).parent
        shutil.copytree(found, directory, dirs_exist_ok=True)
    save_expected(source, directory, dequantized_by_autoround(directory))


def dequantized_by_autoround(directory: Path) -> dict[str, Any]:
    """Each product's weight as its own torch kernels have it: what they make of the unit rows, less the bias."""
    import torch
    from transformers import AutoModelForCausalLM, AutoRoundConfig

    plain = json.loads((directory / "config.json").read_text())
    config = plain["quantization_config"]
    if "awq" in (config["quant_method"], *str(config.get("packing_format")).split("_")):
        from auto_round.export.export_to_awq.utils import dequantize_gemm

        return dequantized_by_awq(directory, dequantize_gemm)[0]
    if config["quant_method"] == "gptq":  # its name for what it wrote
        config |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(directory, scratch, dirs_exist_ok=True)
        (Path(scratch) / "config.json").write_text(json.dumps(plain))
        model = AutoModelForCausalLM.from_pretrained(
            scratch, dtype=torch.float32, quantization_config=AutoRoundConfig(backend="torch")
        )
    return {f"{name}.weight": by_unit_rows(module) for name, module in model.named_modules() if is_packed(module)}


def is_packed(module: Any) -> bool:
    return hasattr(module, "qweight")


def by_unit_rows(module: Any) -> Any:
    """W [N, K] of a module that multiplies."""
    import torch

    width = getattr(module, "in_features", None) or module.infeatures
    with torch.no_grad():
        rows = torch.eye(width)
        out = module(rows).float()
        return (out - module(torch.zeros(1, width)).float()).t().contiguous()


# --- GPTQModel ---


def gptqmodel(options: dict[str, Any], source: Path, directory: Path) -> None:
    import torch

    os.cpu_count = lambda: 8  # it makes pools of threads that fewer cannot have
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    config = QuantizeConfig(**{"bits": 4, "group_size": 32, "device": "cpu", "offload_to_disk": False} | options)
    tool = GPTQModel.load(str(source), config, dtype=torch.float32)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples(source)]
    tool.quantize(rows, batch_size=1, backend=BACKEND.TORCH)
    tool.save(str(directory))
    del tool
    loaded = GPTQModel.load(str(directory), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)
    weights = {}
    for name, module in loaded.model.named_modules():
        if is_packed(module):
            module.scales = module.scales.float()
            weights[f"{name}.weight"] = module.dequantize_weight().t().float()
    save_expected(source, directory, weights)


# --- AutoAWQ ---


def autoawq(options: dict[str, Any], source: Path, directory: Path) -> None:
    import torch
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoTokenizer

    tool = AutoAWQForCausalLM.from_pretrained(str(source), device_map="cpu", torch_dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(source)
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"} | options
    tool.quantize(
        tokenizer, quant_config=config, calib_data=[text[:60] for text in TEXTS], max_calib_seq_len=64, apply_clip=False
    )
    tool.save_quantized(str(directory))
    weights, plain = dequantized_by_awq(directory, dequantize_gemm)
    save_expected(source, directory, weights | plain)  # it scales norms and weights that it leaves in 16 bits


def dequantized_by_awq(directory: Path, dequantize: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights that are packed in AWQ's order, by a tool's own function, and the tensors that are not."""
    from safetensors import safe_open

    group = json.loads((directory / "config.json").read_text())["quantization_config"]["group_size"]
    weights, plain = {}, {}
    with safe_open(directory / "model.safetensors", framework="pt") as handle:
        for name in handle.keys():  # noqa: SIM118 - it is no dict
            module, _, role = name.rpartition(".")
            if role == "qweight":
                codes, zeros, scales = (handle.get_tensor(f"{module}.{of}") for of in (role, "qzeros", "scales"))
                weights[f"{module}.weight"] = dequantize(codes, zeros, scales.float(), 4, group).t().contiguous()
            elif role not in ("qzeros", "scales"):
                plain[name] = handle.get_tensor(name)
    return weights, plain


# --- Cases: the tool's distribution, the family, and what makes the checkpoint ---

Make = Callable[[Path, Path], None]


def _cases() -> dict[str, tuple[str, str, Make]]:
    compressed: dict[str, tuple[str, Callable[[], Any]]] = {
        "w4a16": ("llama", partial(grouped, strategy="group", group_size=32)),
        "w4a16-asymmetric": ("qwen3", partial(grouped, strategy="group", group_size=32, symmetric=False)),
        "w4a16-channel": ("qwen2", partial(grouped, strategy="channel")),
        "w4a16-gptq-act-order": ("qwen3", partial(gptq_recipe, strategy="group", group_size=32, actorder="weight")),
        "w4a16-experts": ("qwen3_moe", partial(grouped, strategy="group", group_size=32)),
        "w8a16": ("llama", partial(grouped, strategy="channel", num_bits=8)),
        "w8a16-group": ("qwen3", partial(grouped, strategy="group", group_size=32, num_bits=8)),
        "w8a8": ("llama", partial(weights_only, "W8A8")),
        "fp8-dynamic": ("qwen3", partial(weights_only, "FP8_DYNAMIC")),
        "fp8-tensor": ("llama", partial(weights_only, "FP8")),
        "fp8-block": ("qwen3", partial(weights_only, "FP8_BLOCK")),
        "fp8-block-experts": ("qwen3_moe", partial(weights_only, "FP8_BLOCK")),
        "fp8-kv-cache": ("llama", partial(weights_only, "FP8_DYNAMIC", kv_cache_scheme=KV_CACHE)),
        "several-forms": ("llama", several_forms),
    }
    rounded: dict[str, tuple[str, str, dict[str, Any]]] = {
        "gptq": ("qwen3", "auto_gptq", {"sym": True}),
        "asymmetric": ("llama", "auto_round", {"sym": False}),
        "symmetric": ("qwen2", "auto_round", {"sym": True}),
        "awq": ("llama", "auto_awq", {"sym": False}),
        "8-bits-in-some": (
            "qwen3",
            "auto_round",
            {"layer_config": {"model.layers.1.mlp.down_proj": {"bits": 8}, "model.layers.0.mlp.up_proj": {"bits": 16}}},
        ),
    }
    gptq: dict[str, tuple[str, dict[str, Any]]] = {
        "act-order": ("qwen3", {"desc_act": True}),
        "asymmetric": ("llama", {"sym": False, "desc_act": False}),
        "version-2": ("llama", {"sym": False, "desc_act": False, "format": "gptq_v2"}),
        "whole-rows": ("qwen2", {"group_size": -1, "desc_act": False, "act_group_aware": False}),
        "8-bits": ("llama", {"bits": 8, "desc_act": False}),
        "head": ("llama", {"lm_head": True, "desc_act": False}),
        "several-forms": (
            "qwen3",
            {"desc_act": False, "dynamic": {r"+:.*down_proj": {"bits": 8}, r"-:.*layers\.0\..*up_proj": {}}},
        ),
        "experts": ("qwen3_moe", {"desc_act": False}),
    }
    awq: dict[str, tuple[str, dict[str, Any]]] = {
        "bias": ("qwen2", {}),
        "spared": ("llama", {"modules_to_not_convert": ["up_proj"]}),
    }
    cases: dict[str, tuple[str, str, Make]] = {}
    for name, (family, recipe) in compressed.items():
        cases[f"llmcompressor-{name}"] = "llmcompressor", family, partial(llmcompressor, recipe)
    for name, (family, form, options) in rounded.items():
        cases[f"auto-round-{name}"] = "auto-round", family, partial(auto_round, form, options)
    for name, (family, options) in gptq.items():
        cases[f"gptqmodel-{name}"] = "gptqmodel", family, partial(gptqmodel, options)
    for name, (family, options) in awq.items():
        cases[f"autoawq-{name}"] = "autoawq", family, partial(autoawq, options)
    return cases


CASES = _cases()


def main() -> None:
    case, directory = sys.argv[1], Path(sys.argv[2])
    tool, family, make = CASES[case]
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(scratch)
        if source == Path(scratch):
            make_model(family, source)
        make(source, directory)
    versions = {name: importlib.metadata.version(name) for name in (tool, "transformers", "torch")}
    (directory / "made_by.json").write_text(json.dumps({"case": case, "versions": versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
