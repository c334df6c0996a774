"""Weights that are packed once and multiply on this processor, in bfloat16 or int8 (`int4_products.py` has four bits).

    weights [N, K]  ->  panels (`panels.py`), when the weight is made
    rows    [M, K]  ->  tiles (`row_tiles.py`), at each product (`products.py`)

Owns the panels' memory, scales and bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from aiexport_edge.kernels.cpu.dot import COLUMNS, MOST_ROWS
from aiexport_edge.kernels.cpu.gather import check_rows
from aiexport_edge.kernels.cpu.panels import OFFSET, gather_outputs, pack_words, quantize_weight
from aiexport_edge.kernels.cpu.products import GROUP, multiply_bfloat16, multiply_int8
from aiexport_edge.kernels.cpu.row_tiles import arrange_rows, pad_rows, quantize_rows, rows_of
from aiexport_edge.kernels.cpu.simd import LANES
from aiexport_edge.kernels.cpu.units import DTYPES
from aiexport_edge.kernels.large_pages import allocate
from aiexport_edge.kernels.quantization import Int8Weight
from aiexport_edge.kernels.threads import empty, launch

PACKED_AT_ONCE = 1 << 22  # numbers


class PackedWeight:
    """A weight [N, K] in panels, as bfloat16 or, where `quantized`, as int8 with a scale per output."""

    def __init__(self, parts: Sequence[torch.Tensor], bias: torch.Tensor | None, *, quantized: bool) -> None:
        """parts [n, K], stacked the weight, on a CPU and in any float dtype; bias [N]."""
        if any(part.shape[0] % COLUMNS for part in parts[:-1]):
            parts = [torch.cat(list(parts))]
        self.num_outputs, self.width = sum(part.shape[0] for part in parts), parts[0].shape[1]
        self.quantized = quantized
        per_word = 4 if quantized else 2
        self._depth = -(-self.width // per_word)
        padded_outputs = -(-self.num_outputs // COLUMNS) * COLUMNS
        self._panels = allocate(padded_outputs * self._depth * 4)
        self._scales = torch.zeros(padded_outputs) if quantized else None
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(padded_outputs)
            self._bias[: self.num_outputs] = bias
        # A few megabytes at a time, so that what is converted does not lie in memory as a whole besides.
        step = max(1, PACKED_AT_ONCE // self.width // COLUMNS) * COLUMNS
        first = 0
        for part in parts:
            for rows in torch.split(part, step):
                self._pack(rows, first)
                first += rows.shape[0]

    @classmethod
    def of_codes(cls, weight: Int8Weight, bias: torch.Tensor | None) -> PackedWeight:
        """A weight that came in int8, with a scale per output."""
        packed = cls([weight.codes], bias, quantized=True)
        assert packed._scales is not None
        packed._scales[: packed.num_outputs] = weight.scales[:, 0]
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._panels.nbytes + sum(part.nbytes for part in (self._scales, self._bias) if part is not None)

    def _pack(self, rows: torch.Tensor, first: int) -> None:
        num_rows = rows.shape[0]
        rows = rows.to(torch.bfloat16) if self._scales is None else self._quantize_weight(rows, first)
        missing = self._depth * (4 if self.quantized else 2) - self.width
        rows = torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()
        launch(
            pack_words,
            -(-num_rows // COLUMNS),
            0.2 * rows.numel(),
            0,
            rows.data_ptr(),
            4 * self._depth,
            num_rows,
            self._depth,
            self._panels.data_ptr() + first * self._depth * 4,
        )

    def _quantize_weight(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """`quantize_int8` with 128 added, uint8; the scales go where they belong."""
        assert self._scales is not None
        if rows.dtype == torch.int8:  # rounded already
            return (rows.to(torch.int16) + OFFSET).to(torch.uint8)
        rows = rows.contiguous()
        out = torch.empty(rows.shape, dtype=torch.uint8)
        launch(
            quantize_weight,
            rows.shape[0],
            0.3 * rows.numel(),
            4 * (self.width + LANES),
            rows.data_ptr(),
            DTYPES[rows.dtype],
            self.width,
            out.data_ptr(),
            self._scales.data_ptr() + 4 * first,
        )
        return out

    def multiply(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [M, K], bfloat16 unless the weight is quantized -> x Wᵀ + b [M, N] in `dtype`."""
        num_rows = x.shape[0]
        out = empty((num_rows, self.num_outputs), dtype)
        if num_rows == 0:
            return out
        x = x.contiguous()
        num_panels = -(-self.num_outputs // COLUMNS)
        bias = 0 if self._bias is None else self._bias.data_ptr()
        if self._scales is None:
            tiles = self._arrange(x)
            launch(
                multiply_bfloat16,
                num_panels,
                self._panels.nbytes * (0.04 + 0.005 * num_rows),
                4 * MOST_ROWS * COLUMNS,
                tiles.data_ptr(),
                num_rows,
                self._panels.data_ptr(),
                self._depth,
                bias,
                out.data_ptr(),
                DTYPES[dtype],
                self.num_outputs,
            )
        else:
            tiles, factors = self._quantize(x)
            launch(
                multiply_int8,
                num_panels,
                self._panels.nbytes * (0.04 + 0.005 * num_rows),
                4 * MOST_ROWS * COLUMNS,
                tiles.data_ptr(),
                factors.data_ptr(),
                num_rows,
                self._panels.data_ptr(),
                self._depth,
                self._scales.data_ptr(),
                bias,
                out.data_ptr(),
                DTYPES[dtype],
                self.num_outputs,
            )
        return out

    def gather(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight's rows `ids` (int64 [T], each in [0, N)) in `dtype`, as products have them: [T, K].

        Raises IndexError for one that is not there, except while launches are recorded.
        """
        check_rows(ids, self.num_outputs)
        ids = ids.contiguous()
        out = empty((ids.shape[0], self.width), dtype)
        launch(
            gather_outputs,
            ids.shape[0],
            4.0 * out.numel(),
            4 * self._depth + 4 * (4 * self._depth + LANES),
            ids.data_ptr(),
            self._panels.data_ptr(),
            self._depth,
            0 if self._scales is None else self._scales.data_ptr(),
            self.width,
            out.data_ptr(),
            DTYPES[dtype],
        )
        return out

    def _arrange(self, x: torch.Tensor) -> torch.Tensor:
        """bfloat16 rows as tiles of words."""
        num_rows = x.shape[0]
        if self.width % 2:  # by a kernel: a library's operation is not taken down where launches are recorded
            padded = empty((num_rows, self.width + 1), x.dtype)
            scratch = 4 * (self.width + LANES)
            launch(pad_rows, num_rows, 0.2 * x.numel(), scratch, x.data_ptr(), self.width, padded.data_ptr())
            x = padded
        if num_rows == 1:
            return x
        tiles = empty((num_rows, self._depth), torch.int32)
        launch(
            arrange_rows,
            -(-num_rows // rows_of(num_rows)),
            0.1 * tiles.numel(),
            0,
            x.data_ptr(),
            num_rows,
            4 * self._depth,
            self._depth,
            tiles.data_ptr(),
        )
        return tiles

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as tiles of int8 words, and the factors of their groups."""
        num_rows, groups = x.shape[0], -(-self.width // GROUP)
        tiles = empty((num_rows, self._depth), torch.int32)
        factors = empty((num_rows, groups, 2), torch.int32)
        launch(
            quantize_rows,
            -(-num_rows // rows_of(num_rows)),
            0.5 * x.numel(),
            (4 * GROUP + 1) * groups + GROUP,
            x.data_ptr(),
            DTYPES[x.dtype],
            num_rows,
            self.width,
            self._depth,
            GROUP,
            OFFSET,
            0,
            tiles.data_ptr(),
            factors.data_ptr(),
        )
        return tiles, factors
