"""Weights in eight and four bits: what the numbers mean, and rounding to them. Knows no product and no file.

FP8 is E4M3 as in P. Micikevicius et al., "FP8 Formats for Deep Learning", 2022: no infinities, 448 is the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

E4M3_MAX = 448.0
INT4_GROUP = 32  # inputs that share a scale where weights are rounded to four bits here
# A group's range may end a little inside of its largest numbers: what is cut off can cost less than it saves.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
AT_ONCE = 1 << 21  # numbers; what is made of them on the way stays in the cache


class _Coded:
    """A weight W [N, K] with a code for each number."""

    __slots__ = ()

    codes: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device


@dataclass(frozen=True, slots=True)
class Int4Weight(_Coded):
    """W [N, K] in four bits: W[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], with g = k // group.

    codes uint8 [N, K], 0 to 15; scales float32 and zeros uint8 [N, ceil(K / group)]. With `order` (int64 [K]) the
    columns of codes are W's columns order[0], order[1], … .
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group: int
    order: Tensor | None = None

    def to(self, device: torch.device) -> Int4Weight:
        """The same there."""
        order = None if self.order is None else self.order.to(device)
        return Int4Weight(self.codes.to(device), self.scales.to(device), self.zeros.to(device), self.group, order)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K]."""
        width = self.shape[1]
        spread = partial(torch.repeat_interleave, repeats=self.group, dim=1)
        wide = self.codes.float().sub_(spread(self.zeros.float())[:, :width]).mul_(spread(self.scales)[:, :width])
        if self.order is not None:
            wide = torch.empty_like(wide).index_copy_(1, self.order, wide)
        return wide.to(dtype)


@dataclass(frozen=True, slots=True)
class Fp8Weight(_Coded):
    """W [N, K] in E4M3: W[n, k] = codes[n, k] * scales[n // block[0], k // block[1]].

    codes float8_e4m3fn [N, K]; scales float32, of whole blocks and those begun: a scale per output is a block of
    (1, K).
    """

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]

    @property
    def is_per_output(self) -> bool:
        """Whether each row of W has one scale."""
        return self.block == (1, self.shape[1])

    def to(self, device: torch.device) -> Fp8Weight:
        """The same there."""
        return Fp8Weight(self.codes.to(device), self.scales.to(device), self.block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K]."""
        (rows, columns), (num_outputs, width) = self.block, self.shape
        scales = self.scales.repeat_interleave(rows, 0)[:num_outputs]
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(columns, 1)[:, :width]
        return self.codes.float().mul_(scales).to(dtype)


@dataclass(frozen=True, slots=True)
class Int8Weight(_Coded):
    """W [N, K] in eight bits: W[n, k] = codes[n, k] * scales[n, k // group].

    codes int8 [N, K], scales float32 [N, ceil(K / group)]; `group` 0: all inputs share one. `order` as `Int4Weight` has
    it.
    """

    codes: Tensor
    scales: Tensor
    group: int = 0
    order: Tensor | None = None

    @property
    def is_per_output(self) -> bool:
        """Whether each row of W has one scale."""
        return self.scales.shape[1] == 1

    def to(self, device: torch.device) -> Int8Weight:
        """The same there."""
        order = None if self.order is None else self.order.to(device)
        return Int8Weight(self.codes.to(device), self.scales.to(device), self.group, order)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [N, K]."""
        scales = self.scales
        if not self.is_per_output:
            scales = scales.repeat_interleave(self.group, dim=1)[:, : self.shape[1]]
        wide = self.codes.float().mul_(scales)
        if self.order is not None:
            wide = torch.empty_like(wide).index_copy_(1, self.order, wide)
        return wide.to(dtype)


QuantizedWeight = Int4Weight | Int8Weight | Fp8Weight
Weight = Tensor | QuantizedWeight


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] in any float dtype to int8 [N, K] in -127 … 127 and float32 scales [N].

    Symmetric, one scale per output: weight[n] is about values[n] * scales[n], no number further off than half a scale.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1).clamp_(min=1e-30) / 127
    return (wide / scales[:, None]).round_().to(torch.int8), scales


def int8_weight(weight: torch.Tensor) -> Int8Weight:
    """weight [N, K] in any float dtype by `quantize_int8`."""
    codes, scales = quantize_int8(weight)
    return Int8Weight(codes, scales[:, None])


def quantize_fp8(weight: torch.Tensor) -> Fp8Weight:
    """weight [N, K] in any float dtype to E4M3 with a scale per output, to the nearest."""
    scales = weight.float().abs().amax(dim=1, keepdim=True).clamp_(min=1e-30) / E4M3_MAX
    codes = (weight.float() / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return Fp8Weight(codes, scales, (1, weight.shape[1]))


def quantize_int4(weight: torch.Tensor, group: int = INT4_GROUP) -> Int4Weight:
    """weight [N, K] in any float dtype to four bits, a scale and a zero per `group` inputs.

    Of a group's range and those a little smaller (SHRINKS), the one with the least squared error.
    """
    width = weight.shape[1]
    rows = max(1, AT_ONCE // width)
    parts = [_quantize_groups(part, group) for part in torch.split(weight, rows)]
    codes, scales, zeros = (torch.cat(each) for each in zip(*parts, strict=True))
    return Int4Weight(codes[:, :width].contiguous(), scales, zeros, group)


def _quantize_groups(weight: torch.Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    num_outputs, width = weight.shape
    wide = torch.nn.functional.pad(weight.float(), (0, -width % group)).view(num_outputs, -1, group)
    low = wide.amin(-1, keepdim=True).clamp_(max=0.0)
    high = wide.amax(-1, keepdim=True).clamp_(min=0.0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.empty(0)
    for shrink in SHRINKS:
        scale = ((high - low) * (shrink / 15.0)).clamp_(min=1e-30)
        zero = (low * -shrink / scale).round_()
        code = (wide / scale).round_().add_(zero).clamp_(0.0, 15.0)
        error = (code - zero).mul_(scale).sub_(wide).square_().sum(-1, keepdim=True)
        if best is None:
            best, least = (code, scale, zero), error
            continue
        better = error < least
        least = torch.where(better, error, least)
        found = zip((code, scale, zero), best, strict=True)
        code, scale, zero = (torch.where(better, new, old) for new, old in found)
        best = code, scale, zero
    assert best is not None
    codes, scales, zeros = best
    return codes.to(torch.uint8).view(num_outputs, -1), scales[..., 0], zeros[..., 0].to(torch.uint8)


def dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W [N, K] in `dtype`, whatever it is."""
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


def stack(parts: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """The parts one below the other: in their own form where that can say it, else as floats of `dtype`."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    if isinstance(first, Int4Weight):
        own4 = [part for part in parts if isinstance(part, Int4Weight) and _same_groups(part, first)]
        if len(own4) == len(parts):
            codes, scales, zeros = (torch.cat([getattr(p, n) for p in own4]) for n in ("codes", "scales", "zeros"))
            return Int4Weight(codes, scales, zeros, first.group, first.order)
    if isinstance(first, Int8Weight):
        whole = [part for part in parts if isinstance(part, Int8Weight) and _same_groups(part, first)]
        if len(whole) == len(parts):
            codes, scales = torch.cat([part.codes for part in whole]), torch.cat([part.scales for part in whole])
            return Int8Weight(codes, scales, first.group, first.order)
    if isinstance(first, Fp8Weight):
        own8 = [part for part in parts if isinstance(part, Fp8Weight) and _same_blocks(part, first)]
        if len(own8) == len(parts):
            codes = torch.cat([part.codes.view(torch.uint8) for part in own8])  # not every torch stacks FP8 on a card
            scales = torch.cat([part.scales for part in own8])
            return Fp8Weight(codes.view(torch.float8_e4m3fn), scales, first.block)
    return torch.cat([dequantized(part, dtype) for part in parts])


def _same_groups(one: Int4Weight | Int8Weight, other: Int4Weight | Int8Weight) -> bool:
    if one.group != other.group or (one.order is None) != (other.order is None):
        return False
    return one.order is None or other.order is None or torch.equal(one.order, other.order)


def _same_blocks(one: Fp8Weight, other: Fp8Weight) -> bool:
    return one.block == other.block and one.shape[0] % one.block[0] == 0 == other.shape[0] % other.block[0]
