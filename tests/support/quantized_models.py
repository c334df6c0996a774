"""Small quantized checkpoints, and the same models with the dequantized weights, in float32.

compressed-tensors' checkpoints are written by its own library. FP8, AWQ and GPTQ are packed here, one number at a time
as their writers do it (DeepSeek-V3's release; AutoAWQ 0.2.9 `WQLinear_GEMM.from_linear`; AutoGPTQ 0.7
`QuantLinear.pack`), and dequantized by those formats' own formulas, not by the product's code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

GROUP = 32
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 397,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=24, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE | {"head_dim": 16}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96, norm_topk_prob=True
    ),
}

Tensors = dict[str, Tensor]
# (the tensors that are stored, the dequantized weight) of a weight [outputs, inputs]
Pack = Callable[[Tensor], tuple[Tensors, Tensor]]


def make(family: str) -> Any:
    """A model with random weights whose logits differ enough."""
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(CONFIGS[family]()).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * (1.2 / parameter.shape[-1] ** 0.5))
    return model.float()


def save(family: str, directory: Path, quantization_config: dict[str, Any], pack: Pack, spared: tuple[str, ...]) -> Any:
    """Write the model `family` with every linear layer packed but those whose names end in one of `spared`.

    Returns the model of transformers with the dequantized weights.
    """
    model = make(family)
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    plain = load_file(file)
    tensors: Tensors = {}
    dequantized: Tensors = {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        is_linear = tensor.dim() == 2 and module.split(".")[-1] not in ("embed_tokens",)
        if not is_linear or module.endswith(spared):
            tensors[name] = tensor
            continue
        stored, dequantized[name] = pack(tensor)
        tensors |= {f"{module}.{role}": value.contiguous() for role, value in stored.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    set_quantization(directory, quantization_config)
    assert dequantized
    return with_weights(family, plain | dequantized, directory)


def set_quantization(directory: Path, quantization_config: dict[str, Any] | None) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    (directory / "config.json").write_text(json.dumps(config))


def with_weights(family: str, tensors: Tensors, directory: Path) -> Any:
    """The model `family` with these weights of a checkpoint, read by transformers."""
    plain = directory.parent / f"{directory.name}-dequantized"
    plain.mkdir(exist_ok=True)
    CONFIGS[family]().save_pretrained(plain)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, plain / "model.safetensors", {"format": "pt"}
    )
    auto: Any = transformers.AutoModelForCausalLM
    return auto.from_pretrained(plain, dtype=torch.float32).eval()


# --- FP8 ---


def fp8(weight: Tensor, block: tuple[int, int], scale_name: str, scale_shape: tuple[int, ...] | None = None) -> Any:
    """E4M3 with a scale per block."""
    rows, columns = block
    scales = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    codes = torch.zeros_like(weight, dtype=torch.float8_e4m3fn)
    wide = torch.zeros_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            wide[place] = codes[place].float() * scales[i, j]
    return {"weight": codes, scale_name: scales if scale_shape is None else scales.reshape(scale_shape)}, wide


# --- Four bits ---


def _round(weight: Tensor, groups: Tensor, *, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [outputs, inputs], scales and zeros [outputs, groups]; `groups` [inputs]: of each input its group."""
    number = int(groups.max()) + 1
    codes = np.zeros(tuple(weight.shape), dtype=np.int64)
    scales, zeros = (np.zeros((weight.shape[0], number)) for _ in range(2))
    for group in range(number):
        part = weight[:, groups == group].double().numpy()
        if symmetric:
            scale, zero = np.abs(part).max(1) / 7, np.full(part.shape[0], 8.0)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scale = (high - low) / 15
            zero = np.clip(np.round(-low / scale), 0, 15)
        scale = scale.astype(np.float16).astype(np.float64)
        codes[:, (groups == group).numpy()] = np.clip(np.round(part / scale[:, None]) + zero[:, None], 0, 15)
        scales[:, group], zeros[:, group] = scale, zero
    return codes, scales, zeros.astype(np.int64)


def _dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: Tensor) -> Tensor:
    own = groups.numpy()
    return torch.from_numpy((codes - zeros[:, own]) * scales[:, own]).float()


def _words(rows: int, columns: int) -> np.ndarray:
    return np.zeros((rows, columns), dtype=np.uint32)


def _tensor(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.view(np.int32).copy())


def awq(weight: Tensor) -> tuple[Tensors, Tensor]:
    """AutoAWQ's "gemm": [inputs, outputs / 8], outputs of a word in the order 0 2 4 6 1 3 5 7."""
    groups = torch.arange(weight.shape[1]) // GROUP
    codes, scales, zeros = _round(weight, groups, symmetric=False)
    num_outputs, width = codes.shape
    qweight, qzeros = _words(width, num_outputs // 8), _words(scales.shape[1], num_outputs // 8)
    for column in range(num_outputs // 8):
        for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            qweight[:, column] |= (codes[column * 8 + place] << (i * 4)).astype(np.uint32)
            qzeros[:, column] |= (zeros[column * 8 + place] << (i * 4)).astype(np.uint32)
    stored = {
        "qweight": _tensor(qweight),
        "qzeros": _tensor(qzeros),
        "scales": torch.from_numpy(scales.T.copy()).half(),
    }
    return stored, _dequantize(codes, scales, zeros, groups)


def gptq(*, symmetric: bool, act_order: bool, version: int, bias: bool = False) -> Pack:
    """AutoGPTQ's: [inputs / 8, outputs], zeros less one in version 1."""

    def pack(weight: Tensor) -> tuple[Tensors, Tensor]:
        width = weight.shape[1]
        groups = torch.arange(width) // GROUP
        if act_order:
            groups = groups[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
        codes, scales, zeros = _round(weight, groups, symmetric=symmetric)
        if version == 1:
            zeros = np.maximum(zeros, 1)  # its writers cannot say 0
            codes, scales, _ = _round(weight, groups, symmetric=symmetric)
        num_outputs = codes.shape[0]
        qweight, qzeros = _words(width // 8, num_outputs), _words(scales.shape[1], num_outputs // 8)
        for row in range(width // 8):
            for i in range(8):
                qweight[row] |= (codes[:, row * 8 + i] << (4 * i)).astype(np.uint32)
        for column in range(num_outputs // 8):
            for i in range(8):
                stored_zeros = zeros[column * 8 + i] - (1 if version == 1 else 0)
                qzeros[:, column] |= (stored_zeros << (4 * i)).astype(np.uint32)
        stored = {
            "qweight": _tensor(qweight),
            "qzeros": _tensor(qzeros),
            "scales": torch.from_numpy(scales.T.copy()).half(),
            "g_idx": groups.to(torch.int32),
        }
        if bias:
            stored["bias"] = torch.zeros(num_outputs)
        return stored, _dequantize(codes, scales, zeros, groups)

    return pack


# --- compressed-tensors ---


def save_compressed(family: str, directory: Path, arguments: dict[str, Any], *, ignore: list[str]) -> Any:
    """Write the model `family` by the compressed-tensors library; its own dequantized model."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    own = QuantizationArgs(**arguments)
    activations = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True, symmetric=True)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=own, input_activations=activations if own.type == "float" else None
    )
    model = make(family)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignore))
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is None:
                continue
            low, high = _ranges(module.weight, own)
            scale, zero = calculate_qparams(low, high, own)
            module.weight_scale.copy_(scale.reshape(module.weight_scale.shape))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.copy_(zero.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(str(directory))
    compressor.decompress_model(model)
    # Its own forward would round activations as well.
    plain = set(make(family).state_dict())
    return with_weights(family, {name: t for name, t in model.state_dict().items() if name in plain}, directory)


def _ranges(weight: Tensor, arguments: Any) -> tuple[Tensor, Tensor]:
    """Least and largest of whatever shares a scale."""
    strategy = str(arguments.strategy)
    if strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if strategy == "group":
        grouped = weight.view(weight.shape[0], -1, arguments.group_size)
        return grouped.amin(-1), grouped.amax(-1)
    rows, columns = arguments.block_structure
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    blocks = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    return blocks.amin((1, 3)), blocks.amax((1, 3))
