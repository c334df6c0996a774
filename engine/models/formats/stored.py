"""Which tensors of a checkpoint make one product's quantized weight, and reading them (`kernels.quantization`).

Owns the tensors' names, shapes and the order of the bits in them. Which products a model has is `loader.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from aiexport_edge.engine.models.config_values import ModelError
from aiexport_edge.engine.models.formats.scheme import Integers, Quantization
from aiexport_edge.kernels.quantization import Fp8Weight, Int4Weight, Int8Weight, Weight

WORD = 32  # bits
# Number i of a word of AWQ's belongs to output AWQ_ORDER[i] of the word's eight.
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
    decode: Callable[[Mapping[str, Tensor], Shape], Weight]

    @property
    def names(self) -> list[str]:
        """All of its tensors."""
        return [*self.tensors.values(), *self.unread]

    def read(self, source: Source) -> Weight:
        """The weight, a float tensor where no product takes its form; in memory of its own as far as it was converted.

        Raises ModelError for values that cannot be.
        """
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


@dataclass(frozen=True, slots=True)
class FusedWeight:
    """The weights [N, K] of all experts of a layer in one tensor of E4M3: [experts, N, K], or each transposed."""

    name: str
    scales: str
    shape: Shape
    block: tuple[int, int]
    is_transposed: bool

    @property
    def names(self) -> list[str]:
        """All of its tensors."""
        return [self.name, self.scales]

    def read(self, source: Source) -> Iterator[Weight]:
        """One expert's after the other. Raises ModelError for scales that cannot be."""
        codes, scales = source.tensor(self.name), source.tensor(self.scales)
        try:
            for of_codes, of_scales in zip(codes, _positive(scales, "a scale"), strict=True):
                if self.is_transposed:
                    of_codes, of_scales = of_codes.view(torch.uint8).t().contiguous(), of_scales.t()
                    of_codes = of_codes.view(torch.float8_e4m3fn)
                yield Fp8Weight(of_codes, of_scales.contiguous(), self.block)
        except _Unreadable as error:
            raise ModelError(f"{self.name}: {error}") from None


def find_fused(
    headers: Mapping[str, Header], name: str, shape: tuple[int, int, int], quantization: Quantization
) -> FusedWeight | None:
    """The experts' weights `name`, `shape` [experts, N, K], as they are stored; None where they are in 16 or 32 bits.

    Raises ModelError naming what is missing or has another shape.
    """
    header = headers.get(name)
    if header is None or header.dtype != "F8_E4M3":
        return None
    scales = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in headers), None)
    if scales is None:
        raise ModelError(f"{header.file}: {name} is F8_E4M3, and has no {name}_scale_inv beside it")
    count, num_outputs, width = shape
    for rows, columns in quantization.blocks:
        row_blocks, column_blocks = -(-num_outputs // rows), -(-width // columns)
        found = header.shape, headers[scales].shape
        for is_transposed, wanted in (
            (False, (shape, (count, row_blocks, column_blocks))),
            (True, ((count, width, num_outputs), (count, column_blocks, row_blocks))),
        ):
            if found == wanted:
                return FusedWeight(name, scales, (num_outputs, width), (rows, columns), is_transposed)
    raise ModelError(
        f"{header.file}: {name} has shape {list(header.shape)} and its scales {list(headers[scales].shape)}; "
        f"config.json asks for {list(shape)}, as it is or each expert transposed, and a scale for each block of its "
        "weight_block_size"
    )


def empty_biases(source: Source, left_over: Iterable[str], stored: Mapping[str, StoredWeight]) -> set[str]:
    """Of the tensors `left_over` the biases of quantized weights that add nothing: GPTQ's writers give every product
    one, whether the model has it or not.
    """
    modules = {weight.module for weight in stored.values()}
    biases = {name for name in left_over if name.endswith(".bias") and name.removesuffix(".bias") in modules}
    return {name for name in biases if not bool(source.tensor(name).any())}


Found = tuple[tuple[str, ...], Callable[[Mapping[str, Tensor], Shape], Weight]] | None


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

    def form(
        self,
        forms: tuple[Integers, ...],
        packed: tuple[str, Callable[[int], tuple[int, ...]]],
        scales: tuple[str, Callable[[int], tuple[int, ...]]],
    ) -> Integers:
        """Which of `forms` the module is in, by its shapes: of its codes by their bits, and of its scales by the number
        of groups. The usual one where none fits: what is wrong is found by whoever checks the tensors.
        """
        width = self.shape[1]
        for form in forms:
            wanted = {packed[0]: packed[1](form.bits), scales[0]: scales[1](num_groups(width, form))}
            found = {role: self._headers.get(f"{self.module}.{role}") for role in wanted}
            if all(header is not None and header.shape == wanted[role] for role, header in found.items()):
                return form
        return forms[0]

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
    blocked: dict[tuple[int, ...], Shape] = {
        (-(-num_outputs // rows), -(-width // columns)): (rows, columns) for rows, columns in quantization.blocks
    }
    block = blocked.get(finder.check(scale, FLOATS, *shapes, *blocked))

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        scales = _positive(tensors[scale], scale)
        if block is not None:
            return Fp8Weight(tensors["weight"], scales.contiguous(), block)
        return Fp8Weight(tensors["weight"], scales.reshape(-1, 1).expand(shape[0], 1).contiguous(), (1, shape[1]))

    return ("weight", scale), decode


def _find_compressed(finder: _Finder, quantization: Quantization) -> Found:
    if not finder.has("weight_packed"):
        return _find_int8(finder) or _find_fp8(finder, quantization)
    num_outputs, width = finder.shape
    form = finder.form(
        quantization.integers or (Integers(4),),
        ("weight_packed", lambda bits: (num_outputs, num_words(width, bits))),
        ("weight_scale", lambda groups: (num_outputs, groups)),
    )
    groups = num_groups(width, form)
    finder.check("weight_packed", ("I32",), (num_outputs, num_words(width, form.bits)))
    finder.check("weight_scale", FLOATS, (num_outputs, groups))
    tensors = ["weight_packed", "weight_scale"]
    if finder.has("weight_shape"):
        finder.check("weight_shape", ("I64", "I32"), (2,))
        tensors.append("weight_shape")
    if finder.has("weight_zero_point"):
        finder.check("weight_zero_point", ("I32",), (num_words(num_outputs, form.bits), groups))
        tensors.append("weight_zero_point")
    if finder.has("weight_g_idx"):
        finder.check("weight_g_idx", ("I32", "I64"), (width,))
        tensors.append("weight_g_idx")

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
            raise _Unreadable(f"weight_shape is {tensors['weight_shape'].tolist()}, config.json asks for {list(shape)}")
        codes = unpack(tensors["weight_packed"], form.bits)[:, : shape[1]]
        zeros = torch.full(tensors["weight_scale"].shape, _middle(form.bits), dtype=torch.uint8)  # is added to both
        if "weight_zero_point" in tensors:
            zeros = unpack(tensors["weight_zero_point"].t(), form.bits).t()[: shape[0]]
        return _weight(codes, tensors["weight_scale"], zeros, form, tensors.get("weight_g_idx"))

    return tuple(tensors), decode


def _find_int8(finder: _Finder) -> Found:
    """One scale an output or for all, as compressed-tensors' "int-quantized" has it."""
    if not finder.has("weight") or finder.dtype("weight") != "I8":
        return None
    num_outputs = finder.shape[0]
    finder.check("weight", ("I8",), finder.shape)
    finder.check("weight_scale", FLOATS, (num_outputs, 1), (num_outputs,), (1,), ())

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        scales = _positive(tensors["weight_scale"], "weight_scale").reshape(-1, 1)
        return Int8Weight(tensors["weight"], scales.expand(shape[0], 1).contiguous())

    return ("weight", "weight_scale"), decode


# --- Integers in words of 32 bits ---


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
    scales = _finite(scales).contiguous()
    if form.bits == 4:
        return Int4Weight(codes.contiguous(), scales, zeros.contiguous(), group, order)
    if bool((zeros == _middle(8)).all()):
        return Int8Weight((codes.to(torch.int16) - _middle(8)).to(torch.int8), scales, group, order)
    wide = codes.float().sub_(zeros.float().repeat_interleave(group, 1)[:, :width])
    wide.mul_(scales.repeat_interleave(group, 1)[:, :width])
    return wide if order is None else torch.empty_like(wide).index_copy_(1, order, wide)


def _positive(scales: Tensor, name: str) -> Tensor:
    """Scales in float32. A weight whose scale is none is no weight."""
    wide = _finite(scales, name)
    if bool((wide < 0).any()):
        raise _Unreadable(f"{name} has numbers below zero")
    return wide


def _finite(scales: Tensor, name: str = "scales") -> Tensor:
    wide = scales.float()
    if not bool(wide.isfinite().all()):
        raise _Unreadable(f"{name} has numbers that are not finite")
    return wide


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
    num_outputs, width = finder.shape
    form = _check_transposed(finder, quantization, lambda bits: (width, num_words(num_outputs, bits)))

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        order = AWQ_ORDER if form.bits == 4 else None
        codes, zeros = (unpack(tensors[role], form.bits, order).t()[: shape[0]] for role in ("qweight", "qzeros"))
        return _weight(codes, tensors["scales"].t(), zeros, form, None)

    return ("qweight", "qzeros", "scales"), decode


def _find_gptq(finder: _Finder, quantization: Quantization) -> Found:
    """As AutoGPTQ and GPTQModel write it: several inputs in a word of weights, several outputs in one of zeros."""
    if not finder.has("qweight"):
        return None
    num_outputs, width = finder.shape
    form = _check_transposed(finder, quantization, lambda bits: (num_words(width, bits), num_outputs))
    tensors = ["qweight", "qzeros", "scales"]
    if finder.has("g_idx"):
        finder.check("g_idx", ("I32", "I64"), (width,))
        tensors.append("g_idx")

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        codes = unpack(tensors["qweight"].t(), form.bits)[:, : shape[1]]
        zeros = unpack(tensors["qzeros"], form.bits).t()[: shape[0]]
        # Version 1 keeps zeros less one, in as many bits.
        zeros = (zeros + quantization.zero_offset) & ((1 << form.bits) - 1)
        return _weight(codes, tensors["scales"].t(), zeros, form, tensors.get("g_idx"))

    return tuple(tensors), decode


def _check_transposed(
    finder: _Finder, quantization: Quantization, packed: Callable[[int], tuple[int, ...]]
) -> Integers:
    """Check what AWQ and GPTQ have in common; the module's form."""
    num_outputs, width = finder.shape
    form = finder.form(quantization.integers, ("qweight", packed), ("scales", lambda groups: (groups, num_outputs)))
    groups = num_groups(width, form)
    finder.check("qweight", ("I32",), packed(form.bits))
    finder.check("qzeros", ("I32",), (groups, num_words(num_outputs, form.bits)))
    finder.check("scales", FLOATS, (groups, num_outputs))
    return form
