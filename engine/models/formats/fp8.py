"""Weights in FP8 (E4M3) as checkpoints have them: one product's, and those of all experts of a layer in one tensor.

Owns their tensors' names and shapes: codes, and scales per tensor, output or block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from aiexport_edge.engine.models.config_values import ModelError
from aiexport_edge.engine.models.formats.module_tensors import (
    FLOATS,
    Found,
    Header,
    ModuleTensors,
    Shape,
    Source,
    Unreadable,
    positive,
)
from aiexport_edge.engine.models.formats.scheme import Quantization
from aiexport_edge.kernels.quantization import Fp8Weight, Weight

CODES = "F8_E4M3"


def find_fp8(module: ModuleTensors, quantization: Quantization) -> Found:
    """Codes with a scale for all, for each output or for each block.

    Raises ModelError as `ModuleTensors.check` does.
    """
    if not module.has("weight") or module.dtype("weight") != CODES:
        return None
    module.check("weight", (CODES,), module.shape)
    scale = "weight_scale_inv" if module.has("weight_scale_inv") else "weight_scale"
    (num_outputs, width), shapes = module.shape, [(), (1,), (1, 1), (module.shape[0],), (module.shape[0], 1)]
    blocked: dict[tuple[int, ...], Shape] = {
        (-(-num_outputs // rows), -(-width // columns)): (rows, columns) for rows, columns in quantization.blocks
    }
    block = blocked.get(module.check(scale, FLOATS, *shapes, *blocked))

    def decode(tensors: Mapping[str, Tensor], shape: Shape) -> Weight:
        scales = positive(tensors[scale], scale)
        if block is not None:
            return Fp8Weight(tensors["weight"], scales.contiguous(), block)
        return Fp8Weight(tensors["weight"], scales.reshape(-1, 1).expand(shape[0], 1).contiguous(), (1, shape[1]))

    return ("weight", scale), decode


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
            for of_codes, of_scales in zip(codes, positive(scales, "a scale"), strict=True):
                if self.is_transposed:
                    of_codes, of_scales = of_codes.view(torch.uint8).t().contiguous(), of_scales.t()
                    of_codes = of_codes.view(torch.float8_e4m3fn)
                yield Fp8Weight(of_codes, of_scales.contiguous(), self.block)
        except Unreadable as error:
            raise ModelError(f"{self.name}: {error}") from None


def find_fused(
    headers: Mapping[str, Header], name: str, shape: tuple[int, int, int], quantization: Quantization
) -> FusedWeight | None:
    """The experts' weights `name`, `shape` [experts, N, K], as they are stored; None where they are in 16 or 32 bits.

    Raises ModelError naming what is missing or has another shape.
    """
    header = headers.get(name)
    if header is None or header.dtype != CODES:
        return None
    scales = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in headers), None)
    if scales is None:
        raise ModelError(f"{header.file}: {name} is {CODES}, and has no {name}_scale_inv beside it")
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
