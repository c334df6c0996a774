"""What config.json's `quantization_config` says about how weights are stored; everything else is refused by name.

Which products are stored so and which are not (`ignore`, `modules_to_not_convert`) is what the files' headers show, and
is not read here. Imports no torch, since the engine process reads configurations without it.

    compressed-tensors   FP8 per tensor, output or block; 4-bit integers packed in int32 (W4A16)
    fp8                  FP8 per tensor or block, as the Qwen and DeepSeek releases have it
    fbgemm_fp8           FP8 per output, as the Llama releases have it
    awq                  4-bit integers, "gemm" order
    gptq                 4-bit integers, with or without act-order, zeros of version 1 and 2
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiexport_edge.engine.models.config_values import ModelError, Values

METHODS = ("compressed-tensors", "fp8", "fbgemm_fp8", "awq", "gptq")
REMEDY = 'take the 16-bit checkpoint, and let quantize = "int8", "int4" or "fp8" round it'
FP8_FORMATS, PACKED_FORMAT = ("float-quantized", "naive-quantized"), "pack-quantized"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's quantized weights are stored. `method` is one of METHODS.

    `block`: rows and columns that share a scale, where a scale's shape alone does not say. `zero_offset` is added to
    stored zeros (GPTQ's first version stores them less one). `group`: inputs that share a scale, 0 for all of them.
    `fp8_kv_cache`: the checkpoint is made for keys and values in FP8.
    """

    method: str
    block: tuple[int, int] | None = None
    zero_offset: int = 0
    group: int = 0
    fp8_kv_cache: bool = False


def read_quantization(values: Values) -> Quantization | None:
    """From config.json's values; None where the checkpoint is not quantized. Raises ModelError for what is not read."""
    raw = values.values.get("quantization_config", values.values.get("compression_config"))
    if raw is None:
        return None
    if not isinstance(raw, Mapping):
        raise values.error("quantization_config", "is not an object")
    own = Values(raw, values.file, "quantization_config.")
    method = raw.get("quant_method")
    if method not in METHODS:
        raise own.error("quant_method", f"is {method!r}; supported are {', '.join(METHODS)}: {REMEDY}")
    return {
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "fbgemm_fp8": lambda _: Quantization("fbgemm_fp8"),
        "awq": _awq,
        "gptq": _gptq,
    }[method](own)


def _require(values: Values, key: str, supported: tuple[Any, ...], *, default: Any) -> None:
    value = values.values.get(key, default)
    if value not in supported:
        listed = " or ".join(repr(each) for each in supported)
        raise values.error(key, f"is {value!r}; supported is {listed}: {REMEDY}")


def _fp8(values: Values) -> Quantization:
    _require(values, "fmt", ("e4m3", None), default=None)
    _require(values, "scale_fmt", ("float", None), default=None)
    _require(values, "activation_scheme", ("dynamic", "static"), default="dynamic")
    return Quantization("fp8", block=_block(values, "weight_block_size"))


def _block(values: Values, key: str) -> tuple[int, int] | None:
    block = values.values.get(key)
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
        raise values.error(key, f"is {block!r}; two positive integers are needed")
    return block[0], block[1]


def _awq(values: Values) -> Quantization:
    _require(values, "version", ("gemm", "GEMM"), default="gemm")
    _require(values, "bits", (4,), default=4)
    _require(values, "zero_point", (True,), default=True)
    return Quantization("awq", group=_group(values))


def _gptq(values: Values) -> Quantization:
    _require(values, "bits", (4,), default=4)
    _require(values, "checkpoint_format", ("gptq", "gptq_v2"), default="gptq")
    if values.values.get("dynamic"):
        raise values.error("dynamic", f"sets single layers apart, which is not supported: {REMEDY}")
    offset = 0 if values.values.get("checkpoint_format") == "gptq_v2" else 1
    return Quantization("gptq", zero_offset=offset, group=_group(values))


def _group(values: Values) -> int:
    group = values.values.get("group_size", 128)
    if isinstance(group, bool) or not isinstance(group, int) or (group != -1 and group <= 0):
        raise values.error("group_size", f"is {group!r}; a positive integer or -1 is needed")
    return max(0, group)


def _compressed_tensors(values: Values) -> Quantization:
    groups = values.values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise values.error("config_groups", "is missing")
    found = {_compressed_group(values, name, group) for name, group in groups.items()}
    if len(found) > 1:
        raise values.error("config_groups", f"differ in how weights are stored, which is not supported: {REMEDY}")
    _refuse_sparsity(values)
    block, group_size = found.pop()
    return Quantization("compressed-tensors", block=block, group=group_size, fp8_kv_cache=_has_fp8_cache(values))


def _compressed_group(values: Values, name: str, group: Any) -> tuple[tuple[int, int] | None, int]:
    """Block and group size of one of `config_groups`."""
    where = f"{values.prefix}config_groups.{name}."
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ModelError(f"{values.file}: {where}weights is missing")
    form = group.get("format") or values.values.get("format")
    if form not in (*FP8_FORMATS, PACKED_FORMAT):
        raise ModelError(
            f"{values.file}: {where}format is {form!r}; supported are {', '.join((*FP8_FORMATS, PACKED_FORMAT))}: "
            f"{REMEDY}"
        )
    weights = Values(group["weights"], values.file, f"{where}weights.")
    activations = group.get("input_activations")
    if form == PACKED_FORMAT:
        _require(weights, "type", ("int",), default="int")
        _require(weights, "num_bits", (4,), default=4)
        if activations is not None:
            raise ModelError(f"{values.file}: {where}input_activations is set beside 4-bit weights: {REMEDY}")
        _require(weights, "strategy", ("group", "channel"), default="group")
        return None, weights.integer("group_size") if weights.values.get("strategy") != "channel" else 0
    _require(weights, "type", ("float",), default=None)
    _require(weights, "num_bits", (8,), default=8)
    _require(weights, "strategy", ("tensor", "channel", "block"), default="tensor")
    if isinstance(activations, Mapping):
        own = Values(activations, values.file, f"{where}input_activations.")
        _require(own, "type", ("float",), default=None)
        _require(own, "num_bits", (8,), default=8)
    return _block(weights, "block_structure"), 0


def _refuse_sparsity(values: Values) -> None:
    sparsity = values.values.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise values.error("sparsity_config.format", f"is {sparsity['format']!r}; supported is 'dense': {REMEDY}")


def _has_fp8_cache(values: Values) -> bool:
    scheme = values.values.get("kv_cache_scheme")
    if scheme is None:
        return False
    if not isinstance(scheme, Mapping):
        raise values.error("kv_cache_scheme", "is not an object")
    own = Values(scheme, values.file, f"{values.prefix}kv_cache_scheme.")
    _require(own, "type", ("float",), default=None)
    _require(own, "num_bits", (8,), default=8)
    return True
