"""What config.json's `quantization_config` says about how weights are stored; everything else is refused by name.

Which products are stored so, in which of several forms, and which are not (`ignore`, `modules_to_not_convert`,
`dynamic`) is what the files' headers show, and is not read here. Imports no torch, since the engine process reads
configurations without it.

    compressed-tensors   FP8 per tensor, output or block; integers of 4 and 8 bits packed in int32; int8 per output
    fp8                  FP8 per tensor or block, as the Qwen and DeepSeek releases have it
    fbgemm_fp8           FP8 per output, as the Llama releases have it
    awq                  4-bit integers, "gemm" order
    gptq                 integers of 4 and 8 bits, with or without act-order, zeros of version 1 and 2
    auto-round           AWQ's or GPTQ's packing, as `packing_format` says
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aiexport_edge.engine.models.config_values import ModelError, Values

METHODS = ("compressed-tensors", "fp8", "fbgemm_fp8", "awq", "gptq", "auto-round")
REMEDY = 'take the 16-bit checkpoint, and let quantize = "int8", "int4" or "fp8" round it'
FP8_FORMATS, PACKED_FORMAT, INT8_FORMAT = ("float-quantized", "naive-quantized"), "pack-quantized", "int-quantized"
FORMATS = (*FP8_FORMATS, PACKED_FORMAT, INT8_FORMAT)
PACKED_BITS = (4, 8)


@dataclass(frozen=True, slots=True, order=True)
class Integers:
    """Whole numbers of `bits`; `group` inputs share a scale, 0 for all of them."""

    bits: int
    group: int = 0


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint's quantized weights are stored. `method` is one of METHODS, auto-round aside.

    `integers`: the forms of packed integers that it may have, the usual one first. `blocks`: rows and columns that
    share a scale of FP8, where a scale's shape alone does not say. `zero_offset` is added to stored zeros (GPTQ's first
    version stores them less one). `fp8_kv_cache`: the checkpoint is made for keys and values in FP8.
    """

    method: str
    integers: tuple[Integers, ...] = ()
    blocks: tuple[tuple[int, int], ...] = ()
    zero_offset: int = 0
    fp8_kv_cache: bool = False

    @property
    def rounding(self) -> str:
        """What `quantize` makes of other checkpoints that comes nearest in size."""
        return f"int{self.integers[0].bits}" if self.integers else "fp8"


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
        "auto-round": _auto_round,
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
    block = _block(values, "weight_block_size")
    return Quantization("fp8", blocks=() if block is None else (block,))


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
    return Quantization("awq", (_integers(values, Integers(4, 128)),))


def _gptq(values: Values) -> Quantization:
    key = "checkpoint_format" if "checkpoint_format" in values.values else "format"
    _require(values, key, ("gptq", "gptq_v2"), default="gptq")
    offset = 0 if values.values.get(key) == "gptq_v2" else 1
    return Quantization("gptq", _all_integers(values, "dynamic"), zero_offset=offset)


def _auto_round(values: Values) -> Quantization:
    _require(values, "data_type", ("int",), default="int")
    packing = values.values.get("packing_format", values.values.get("backend", "auto_round"))
    words = str(packing).split(":")
    if words[0] != "auto_round" or not set(words[1:]) <= {
        "auto_awq",
        "awq",
        "auto_gptq",
        "gptq",
        "exllamav2",
        "gptqmodel",
    }:
        raise values.error(
            "packing_format",
            f"is {packing!r}; supported are 'auto_round', 'auto_round:auto_gptq' and 'auto_round:auto_awq': {REMEDY}",
        )
    _refuse_rounded_rows(values)
    integers = _all_integers(values, "extra_config")
    if "awq" in str(packing):
        return Quantization("awq", integers)
    # Its own packing is GPTQ's with zeros as they are.
    return Quantization("gptq", integers, zero_offset=1 if "gptq" in str(packing) else 0)


def _refuse_rounded_rows(values: Values) -> None:
    bits = values.values.get("act_bits", 16)
    if not isinstance(bits, int) or bits < 16:
        raise values.error("act_bits", f"is {bits!r}; supported is 16: {REMEDY}")


def _all_integers(values: Values, overrides: str) -> tuple[Integers, ...]:
    """The usual form, and those that `overrides` gives to single layers; one without bits says what is left out."""
    usual = _integers(values, Integers(4, 128))
    found = {usual: None}
    several = values.values.get(overrides) or {}
    if not isinstance(several, Mapping):
        raise values.error(overrides, "is not an object")
    for name, of in several.items():
        if str(name).startswith("-:") or of is False:
            continue
        if not isinstance(of, Mapping):
            raise values.error(f"{overrides}.{name}", "is not an object")
        bits = of.get("bits", usual.bits)
        if isinstance(bits, int) and bits >= 16:
            continue  # as it was
        own = Values(of, values.file, f"{values.prefix}{overrides}.{name}.")
        _require(own, "data_type", ("int", None), default=None)
        found[_integers(own, usual)] = None
    return tuple(found)


def _integers(values: Values, default: Integers) -> Integers:
    _require(values, "bits", PACKED_BITS, default=default.bits)
    group = values.values.get("group_size", default.group)
    if (
        isinstance(group, bool)
        or not isinstance(group, int)
        or (group != -1 and group <= 0 and "group_size" in values.values)
    ):
        raise values.error("group_size", f"is {group!r}; a positive integer or -1 is needed")
    return Integers(int(values.values.get("bits", default.bits)), max(0, group))


def _compressed_tensors(values: Values) -> Quantization:
    groups = values.values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise values.error("config_groups", "is missing")
    _refuse_sparsity(values)
    found = [_compressed_group(values, name, group) for name, group in groups.items()]
    integers = dict.fromkeys(form for form in found if isinstance(form, Integers))
    blocks = dict.fromkeys(form for form in found if isinstance(form, tuple))
    return Quantization("compressed-tensors", tuple(integers), tuple(blocks), fp8_kv_cache=_has_fp8_cache(values))


def _compressed_group(values: Values, name: str, group: Any) -> Integers | tuple[int, int] | None:
    """The form of one of `config_groups`: its integers, its blocks of FP8, or None where scales show what they are."""
    where = f"{values.prefix}config_groups.{name}."
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise ModelError(f"{values.file}: {where}weights is missing")
    form = group.get("format") or values.values.get("format")
    if form not in FORMATS:
        raise ModelError(f"{values.file}: {where}format is {form!r}; supported are {', '.join(FORMATS)}: {REMEDY}")
    weights = Values(group["weights"], values.file, f"{where}weights.")
    activations = group.get("input_activations")
    if form == PACKED_FORMAT:
        _require(weights, "type", ("int",), default="int")
        _require(weights, "num_bits", PACKED_BITS, default=4)
        if activations is not None:
            raise ModelError(f"{values.file}: {where}input_activations is set beside packed weights: {REMEDY}")
        _require(weights, "strategy", ("group", "channel"), default="group")
        is_grouped = weights.values.get("strategy") != "channel"
        return Integers(weights.integer("num_bits", default=4), weights.integer("group_size") if is_grouped else 0)
    kind = "int" if form == INT8_FORMAT else "float"
    _require(weights, "type", (kind,), default=None)
    _require(weights, "num_bits", (8,), default=8)
    strategies = ("tensor", "channel") if form == INT8_FORMAT else ("tensor", "channel", "block")
    _require(weights, "strategy", strategies, default="tensor")
    if isinstance(activations, Mapping):
        own = Values(activations, values.file, f"{where}input_activations.")
        _require(own, "type", (kind,), default=None)
        _require(own, "num_bits", (8,), default=8)
    if form == INT8_FORMAT:
        _require(weights, "symmetric", (True,), default=True)
        return Integers(8)
    return _block(weights, "block_structure")


def _refuse_sparsity(values: Values) -> None:
    sparsity = values.values.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise values.error("sparsity_config.format", f"is {sparsity['format']!r}; supported is 'dense': {REMEDY}")
    if values.values.get("transform_config"):
        raise values.error("transform_config", f"turns what products are given, which is not supported: {REMEDY}")


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
