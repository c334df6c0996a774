"""Which tensors of a checkpoint make one product's quantized weight, and reading them (`kernels.quantization`).

Owns the tensors' names, shapes and the order of the bits in them. Which products a model has is `loader.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aiexport_edge.engine.models.config_values import ModelError
from aiexport_edge.engine.models.formats.scheme import Quantization
from aiexport_edge.kernels.quantization import Fp8Weight, Int4Weight, QuantizedWeight

NIBBLES = 8  # of a 32-bit word
# Nibble i of a word of AWQ's belongs to output AWQ_ORDER[i] of the word's eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FLOATS = ("F32", "F16", "BF16")
# Scales of activations, which are measured as they come; the weight's own sum of what it multiplies; sizes.
UNREAD = ("input_scale", "input_global_scale", "input_zero_point")

SUFFIX = ".weight"
Shape = tuple[int, int]


class Header(Protocol):
    """What a file says about a tensor."""

    @property
    def file(self) -> object: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


class Source(Protocol):
    """Where tensors are read, by name."""

    def tensor(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One product's weight [N, K]. `tensors` by what they are; `unread` belong to it and are not needed."""

    module: str
    shape: Shape
    tensors: Mapping[str, str]
    unread: tuple[str, ...]
    decode: Callable[[Mapping[str, Tensor], Shape], QuantizedWeight]

    @property
    def names(self) -> list[str]:
        """All of its tensors."""
        return [*self.tensors.values(), *self.unread]

    def read(self, source: Source) -> QuantizedWeight:
        """The weight, in memory of its own as far as it was converted. Raises ModelError for values that cannot be."""
        try:
            return self.decode({role: source.tensor(name) for role, name in self.tensors.items()}, self.shape)
        except _Unreadable as error:
            raise ModelError(f"{self.module}: {error}") from None


class _Unreadable(Exception):
    """What is wrong with a weight's values."""


def find_stored(
    headers: Mapping[str, Header], module: str, shape: Shape, quantization: Quantization
) -> StoredWeight | None:
    """The product `module` as it is stored; None where the files have it in 16 or 32 bits, or not at all.

    Raises ModelError naming the tensor that is missing or has another shape or dtype than the format asks for.
    """
    make = {
        "compressed-tensors": _find_compressed,
        "fp8": _find_fp8,
        "fbgemm_fp8": _find_fp8,
        "awq": _find_awq,
        "gptq": _find_gptq,
    }[quantization.method]
    found = make(_Finder(headers, module, shape), quantization)
    if found is None:
        return None
    tensors, decode = found
    unread = tuple(f"{module}.{role}" for role in UNREAD if f"{module}.{role}" in headers)
    return StoredWeight(module, shape, {role: f"{module}.{role}" for role in tensors}, unread, decode)


def find_all(
    headers: Mapping[str, Header],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Quantization,
) -> dict[str, StoredWeight]:
    """Of the tensors `shapes` that a model needs, those that are quantized weights; `names` are the checkpoint's.

    Raises ModelError as `find_stored` does.
    """
    found = {}
    for name, shape in shapes.items():
        if name.endswith(SUFFIX) and len(shape) == 2:
            module = names[name].removesuffix(SUFFIX)
            stored = find_stored(headers, module, (shape[0], shape[1]), quantization)
            if stored is not None:
                found[name] = stored
    return found


def empty_biases(source: Source, left_over: Iterable[str], stored: Mapping[str, StoredWeight]) -> set[str]:
    """Of the tensors `left_over` the biases of quantized weights that add nothing: GPTQ's writers give every product
    one, whether the model has it or not.
    """
    modules = {weight.module for weight in stored.values()}
    biases = {name for name in left_over if name.endswith(".bias") and name.removesuffix(".bias") in modules}
    return {name for name in biases if not bool(source.tensor(name).any())}


Found = tuple[tuple[str, ...], Callable[[Mapping[str, Tensor], Shape], QuantizedWeight]] | None


class _Finder:
    """The tensors of one module."""

    def __init__(self, headers: Mapping[str, Header], module: str, shape: Shape) -> None:
        self._headers = headers
        self.module = module
        self.shape = shape

    def has(self, role: str) -> bool:
        return f"{self.module}.{role}" in self._headers

    def dtype(self, role: str) -> str:
        return self._headers[f"{self.module}.{role}"].dtype

    def check(self, role: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a tensor, which must be one of `shapes`."""
        name = f"{self.module}.{role}"
        header = self._headers.get(name)
        if header is None:
            raise ModelError(f"{name} is missing, though the weight of {self.module} is quantized")
        if header.shape not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise ModelError(f"{header.file}: {name} has shape {list(header.shape)}, the format asks for {wanted}")
        if header.dtype not in dtypes:
            raise ModelError(f"{header.file}: {name} is {header.dtype}, the format asks for {' or '.join(dtypes)}")
        return header.shape


# --- FP8 ---


def _find_fp8(finder: _Finder, quantization: Quantization) -> Found:
    if not finder.has("weight") or finder.dtype("weight") != "F8_E4M3":
        return None
    finder.check("weight", ("F8_E4M3",), finder.shape)
    scale = "weight_scale_inv" if finder.has("weight_scale_inv") else "weight_scale"
    (num_outputs, width), shapes = finder.shape, [(), (1,), (1, 1), (finder.shape[0],), (finder.shape[0], 1)]
    block = quantization.block
    if block is not None:
        shapes.append((-(-num_outputs // block[0]), -(-width // block[1])))
    shape = finder.check(scale, FLOATS, *shapes)
    is_blocked = block is not None and len(shape) == 2 and shape == shapes[-1]

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> QuantizedWeight:
        scales = tensors[scale].float()
        if is_blocked and block is not None:
            return Fp8Weight(tensors["weight"], scales.contiguous(), block)
        return Fp8Weight(tensors["weight"], scales.reshape(-1, 1).expand(shape[0], 1).contiguous(), (1, shape[1]))

    return ("weight", scale), decode


def _find_compressed(finder: _Finder, quantization: Quantization) -> Found:
    if not finder.has("weight_packed"):
        return _find_fp8(finder, quantization)
    num_outputs, width = finder.shape
    group = quantization.group or width
    groups = -(-width // group)
    finder.check("weight_packed", ("I32",), (num_outputs, -(-width // NIBBLES)))
    finder.check("weight_scale", FLOATS, (num_outputs, groups))
    tensors = ["weight_packed", "weight_scale"]
    if finder.has("weight_shape"):
        finder.check("weight_shape", ("I64", "I32"), (2,))
        tensors.append("weight_shape")
    if finder.has("weight_zero_point"):
        finder.check("weight_zero_point", ("I32",), (-(-num_outputs // NIBBLES), groups))
        tensors.append("weight_zero_point")
    if finder.has("weight_g_idx"):
        finder.check("weight_g_idx", ("I32", "I64"), (width,))
        tensors.append("weight_g_idx")

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> QuantizedWeight:
        if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
            raise _Unreadable(f"weight_shape is {tensors['weight_shape'].tolist()}, config.json asks for {list(shape)}")
        codes = unpack_nibbles(tensors["weight_packed"])[:, : shape[1]]
        scales = tensors["weight_scale"].float()
        zeros = torch.full(scales.shape, 8, dtype=torch.uint8)  # both are stored with 8 added
        if "weight_zero_point" in tensors:
            zeros = unpack_nibbles(tensors["weight_zero_point"].t()).t()[: shape[0]]
        order = _order(tensors["weight_g_idx"], group) if "weight_g_idx" in tensors else None
        return _int4(codes, scales, zeros, group, order)

    return tuple(tensors), decode


# --- Four bits ---


def unpack_nibbles(words: Tensor, order: tuple[int, ...] = tuple(range(NIBBLES))) -> Tensor:
    """int32 [R, C] -> uint8 [R, 8 * C]: number order[i] of each word's eight is its nibble i, the lowest first."""
    octets = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    nibbles = torch.stack((octets & 15, octets >> 4), dim=-1).view(*words.shape, NIBBLES)
    places = torch.empty(NIBBLES, dtype=torch.int64)
    places[torch.tensor(order)] = torch.arange(NIBBLES)
    return nibbles[..., places].view(words.shape[0], -1)


def _int4(codes: Tensor, scales: Tensor, zeros: Tensor, group: int, order: Tensor | None) -> Int4Weight:
    """With the columns of codes in the order of their groups where they were not."""
    if order is not None:
        codes = codes[:, order]
    return Int4Weight(codes.contiguous(), scales.float().contiguous(), zeros.contiguous(), group, order)


def _order(groups: Tensor, group: int) -> Tensor | None:
    """The inputs by their groups, None where they lie so. `groups` [K]: of each input its group."""
    groups = groups.long()
    width = groups.shape[0]
    if torch.equal(groups, torch.arange(width) // group) or bool((groups == -1).all()):
        return None
    counts = torch.bincount(groups.clamp_min(0), minlength=-(-width // group))
    if bool((groups < 0).any()) or counts.shape[0] * group != width or not bool((counts == group).all()):
        raise _Unreadable(f"g_idx does not share out {width} inputs to groups of {group}")
    return torch.argsort(groups, stable=True)


def _find_awq(finder: _Finder, quantization: Quantization) -> Found:
    """As AutoAWQ's "gemm" version writes it: everything by inputs, eight outputs in a word."""
    if not finder.has("qweight"):
        return None
    group, groups = _check_transposed(finder, quantization, (finder.shape[1], finder.shape[0] // NIBBLES))

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> QuantizedWeight:
        codes, zeros = (unpack_nibbles(tensors[role], AWQ_ORDER).t() for role in ("qweight", "qzeros"))
        return _int4(codes, tensors["scales"].t(), zeros, group, None)

    assert groups
    return ("qweight", "qzeros", "scales"), decode


def _find_gptq(finder: _Finder, quantization: Quantization) -> Found:
    """As AutoGPTQ and GPTQModel write it: eight inputs in a word of weights, eight outputs in one of zeros."""
    if not finder.has("qweight"):
        return None
    group, _ = _check_transposed(finder, quantization, (math.ceil(finder.shape[1] / NIBBLES), finder.shape[0]))
    tensors = ["qweight", "qzeros", "scales"]
    if finder.has("g_idx"):
        finder.check("g_idx", ("I32", "I64"), (finder.shape[1],))
        tensors.append("g_idx")

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> QuantizedWeight:
        codes = unpack_nibbles(tensors["qweight"].t())[:, : shape[1]]
        zeros = unpack_nibbles(tensors["qzeros"]).t()[: shape[0]]
        order = _order(tensors["g_idx"], group) if "g_idx" in tensors else None
        # Version 1 keeps zeros less one, in four bits.
        return _int4(codes, tensors["scales"].t(), (zeros + quantization.zero_offset) & 15, group, order)

    return tuple(tensors), decode


def _check_transposed(finder: _Finder, quantization: Quantization, packed: Shape) -> tuple[int, int]:
    """Check what AWQ and GPTQ have in common; inputs of a group, and number of groups."""
    num_outputs, width = finder.shape
    group = quantization.group or width
    groups = -(-width // group)
    finder.check("qweight", ("I32",), packed)
    finder.check("qzeros", ("I32",), (groups, -(-num_outputs // NIBBLES)))
    finder.check("scales", FLOATS, (groups, num_outputs))
    return group, groups
