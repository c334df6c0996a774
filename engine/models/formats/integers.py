"""Weights in integers of 4 and 8 bits as checkpoints have them: packed in words of 32 bits, or int8 per output.

Owns the tensors' names and shapes and the order of the bits in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from aiexport_edge.engine.models.formats.module_tensors import (
    FLOATS,
    Found,
    ModuleTensors,
    Shape,
    Unreadable,
    finite,
    positive,
)
from aiexport_edge.engine.models.formats.scheme import Integers, Quantization
from aiexport_edge.kernels.quantization import Int4Weight, Int8Weight, Weight

WORD = 32  # bits
# Number i of a word of AWQ's belongs to output AWQ_ORDER[i] of the word's eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def find_packed(module: ModuleTensors, quantization: Quantization) -> Found:
    """As compressed-tensors' "pack-quantized" has it: several inputs in a word.

    Raises ModelError as `ModuleTensors.check` does.
    """
    if not module.has("weight_packed"):
        return None
    num_outputs, width = module.shape
    form = _form(
        module,
        quantization.integers or (Integers(4),),
        ("weight_packed", lambda bits: (num_outputs, num_words(width, bits))),
        ("weight_scale", lambda groups: (num_outputs, groups)),
    )
    groups = num_groups(width, form)
    module.check("weight_packed", ("I32",), (num_outputs, num_words(width, form.bits)))
    module.check("weight_scale", FLOATS, (num_outputs, groups))
    tensors = ["weight_packed", "weight_scale"]
    if module.has("weight_shape"):
        module.check("weight_shape", ("I64", "I32"), (2,))
        tensors.append("weight_shape")
    if module.has("weight_zero_point"):
        module.check("weight_zero_point", ("I32",), (num_words(num_outputs, form.bits), groups))
        tensors.append("weight_zero_point")
    if module.has("weight_g_idx"):
        module.check("weight_g_idx", ("I32", "I64"), (width,))
        tensors.append("weight_g_idx")

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
            raise Unreadable(f"weight_shape is {tensors['weight_shape'].tolist()}, config.json asks for {list(shape)}")
        codes = unpack(tensors["weight_packed"], form.bits)[:, : shape[1]]
        zeros = torch.full(tensors["weight_scale"].shape, _middle(form.bits), dtype=torch.uint8)  # is added to both
        if "weight_zero_point" in tensors:
            zeros = unpack(tensors["weight_zero_point"].t(), form.bits).t()[: shape[0]]
        return _weight(codes, tensors["weight_scale"], zeros, form, tensors.get("weight_g_idx"))

    return tuple(tensors), decode


def find_awq(module: ModuleTensors, quantization: Quantization) -> Found:
    """As AutoAWQ's "gemm" version writes it: everything by inputs, eight outputs in a word.

    Raises ModelError as `ModuleTensors.check` does.
    """
    if not module.has("qweight"):
        return None
    num_outputs, width = module.shape
    form = _check_transposed(module, quantization, lambda bits: (width, num_words(num_outputs, bits)))

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        order = AWQ_ORDER if form.bits == 4 else None
        codes, zeros = (unpack(tensors[role], form.bits, order).t()[: shape[0]] for role in ("qweight", "qzeros"))
        return _weight(codes, tensors["scales"].t(), zeros, form, None)

    return ("qweight", "qzeros", "scales"), decode


def find_gptq(module: ModuleTensors, quantization: Quantization) -> Found:
    """As AutoGPTQ and GPTQModel write it: several inputs in a word of weights, several outputs in one of zeros.

    Raises ModelError as `ModuleTensors.check` does.
    """
    if not module.has("qweight"):
        return None
    num_outputs, width = module.shape
    form = _check_transposed(module, quantization, lambda bits: (num_words(width, bits), num_outputs))
    tensors = ["qweight", "qzeros", "scales"]
    if module.has("g_idx"):
        module.check("g_idx", ("I32", "I64"), (width,))
        tensors.append("g_idx")

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        codes = unpack(tensors["qweight"].t(), form.bits)[:, : shape[1]]
        zeros = unpack(tensors["qzeros"], form.bits).t()[: shape[0]]
        # Version 1 keeps zeros less one, in as many bits.
        zeros = (zeros + quantization.zero_offset) & ((1 << form.bits) - 1)
        return _weight(codes, tensors["scales"].t(), zeros, form, tensors.get("g_idx"))

    return tuple(tensors), decode


def _form(
    module: ModuleTensors,
    forms: tuple[Integers, ...],
    packed: tuple[str, Callable[[int], tuple[int, ...]]],
    scales: tuple[str, Callable[[int], tuple[int, ...]]],
) -> Integers:
    """Which of `forms` the module is in, by its shapes: of its codes by their bits, and of its scales by the number of
    groups. The usual one where none fits: what is wrong is found by whoever checks the tensors.
    """
    width = module.shape[1]
    for form in forms:
        wanted = {packed[0]: packed[1](form.bits), scales[0]: scales[1](num_groups(width, form))}
        if all(module.shape_of(role) == shape for role, shape in wanted.items()):
            return form
    return forms[0]


def _check_transposed(
    module: ModuleTensors, quantization: Quantization, packed: Callable[[int], tuple[int, ...]]
) -> Integers:
    """Check what AWQ and GPTQ have in common; the module's form."""
    num_outputs, width = module.shape
    form = _form(module, quantization.integers, ("qweight", packed), ("scales", lambda groups: (groups, num_outputs)))
    groups = num_groups(width, form)
    module.check("qweight", ("I32",), packed(form.bits))
    module.check("qzeros", ("I32",), (groups, num_words(num_outputs, form.bits)))
    module.check("scales", FLOATS, (groups, num_outputs))
    return form


def find_int8(module: ModuleTensors) -> Found:
    """One scale an output or for all, as compressed-tensors' "int-quantized" has it.

    Raises ModelError as `ModuleTensors.check` does.
    """
    if not module.has("weight") or module.dtype("weight") != "I8":
        return None
    num_outputs = module.shape[0]
    module.check("weight", ("I8",), module.shape)
    module.check("weight_scale", FLOATS, (num_outputs, 1), (num_outputs,), (1,), ())

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        scales = positive(tensors["weight_scale"], "weight_scale").reshape(-1, 1)
        return Int8Weight(tensors["weight"], scales.expand(shape[0], 1).contiguous())

    return ("weight", "weight_scale"), decode


def num_words(numbers: int, bits: int) -> int:
    """Words that so many numbers take."""
    return -(-numbers * bits // WORD)


def num_groups(width: int, form: Integers) -> int:
    """Groups that so many inputs make."""
    return -(-width // form.group) if form.group else 1


def unpack(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 [R, C] of 4 or 8 bits -> uint8 [R, C * 32 / bits]: number order[i] of each word's is its i-th, the lowest
    first.
    """
    octets = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    numbers = octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    if order is not None:
        places = torch.empty(len(order), dtype=torch.int64)
        places[torch.tensor(order)] = torch.arange(len(order))
        numbers = numbers[..., places]
    return numbers.reshape(words.shape[0], -1)


def _middle(bits: int) -> int:
    """The zero of symmetric codes."""
    return 1 << (bits - 1)


def _weight(codes: Tensor, scales: Tensor, zeros: Tensor, form: Integers, g_idx: Tensor | None) -> Weight:
    """codes uint8 [N, K], scales and zeros [N, groups]. A weight in eight bits that is not symmetric is decoded."""
    width = codes.shape[1]
    group = form.group or width
    order = None if g_idx is None else _order(g_idx, group)
    if order is not None:  # the columns of codes in the order of their groups
        codes = codes[:, order]
    scales = finite(scales).contiguous()
    if form.bits == 4:
        return Int4Weight(codes.contiguous(), scales, zeros.contiguous(), group, order)
    if bool((zeros == _middle(8)).all()):
        return Int8Weight((codes.to(torch.int16) - _middle(8)).to(torch.int8), scales, group, order)
    wide = codes.float().sub_(zeros.float().repeat_interleave(group, 1)[:, :width])
    wide.mul_(scales.repeat_interleave(group, 1)[:, :width])
    return wide if order is None else torch.empty_like(wide).index_copy_(1, order, wide)


def _order(groups: Tensor, group: int) -> Tensor | None:
    """The inputs by their groups, None where they lie so. `groups` [K]: of each input its group."""
    groups = groups.long()
    width = groups.shape[0]
    if torch.equal(groups, torch.arange(width) // group) or bool((groups == -1).all()):
        return None
    counts = torch.bincount(groups.clamp_min(0), minlength=-(-width // group))
    if bool((groups < 0).any()) or counts.shape[0] * group != width or not bool((counts == group).all()):
        raise Unreadable(f"g_idx does not share out {width} inputs to groups of {group}")
    return torch.argsort(groups, stable=True)
