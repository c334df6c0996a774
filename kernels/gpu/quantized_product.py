"""A product with a quantized weight on a GPU: which kernel multiplies how many rows.

up to MOST_ROWS rows    W decoded in registers (`packed_linear`); always where a row's bits may not vary
more, FP8 weights       FP8 rows on cards that multiply them: the library's product for scales per output, where
                        it takes the shape, else our own (`fp8_linear`)
more, otherwise         W decoded into memory, and the library's 16-bit product
"""

from __future__ import annotations

import torch
from torch import Tensor

from aiexport_edge.kernels.gpu import fp8_linear
from aiexport_edge.kernels.gpu.launch import Architecture, architecture_of
from aiexport_edge.kernels.gpu.packed_linear import E4M3, CardWeight, decode_weight, pack, packed_linear, takes
from aiexport_edge.kernels.quantization import QuantizedWeight

MOST_ROWS = 64
DTYPES = (torch.bfloat16, torch.float16)
LIBRARY_MULTIPLE = 16  # of N and K, for the library's FP8 products


def fits(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether `CardProduct` takes it; the rest is decoded into `dtype` once, when it is loaded."""
    return dtype in DTYPES and takes(weight)


def multiplies_fp8(device: torch.device) -> bool:
    """Whether the card has FP8 products; where not, E4M3 is decoded by its bits."""
    return architecture_of(device).capability >= fp8_linear.LOWEST_CAPABILITY


class CardProduct:
    """x Wᵀ + b with W in four or eight bits, on the device where it lies."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        deterministic: bool,
        architecture: Architecture | None = None,
    ) -> None:
        """weight: one that `fits`. `deterministic`: a row's bits depend on that row alone."""
        self._weight: CardWeight = pack(weight)
        self._bias = None if bias is None else bias.to(dtype).contiguous()
        self._dtype = dtype
        self._deterministic = deterministic
        self._architecture = architecture or architecture_of(weight.device)
        has_fp8 = self._architecture.capability >= fp8_linear.LOWEST_CAPABILITY
        self._multiplies_fp8 = self._weight.kind == E4M3 and has_fp8 and fp8_linear.takes(self._weight)
        self._uses_library = self._multiplies_fp8 and not deterministic and self._library_takes_it()

    def multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [M, K] -> [M, N] in `dtype`."""
        weight = self._weight
        if x.stride(1) != 1:
            x = x.contiguous()
        if x.shape[0] > MOST_ROWS and self._multiplies_fp8 and not self._deterministic:
            codes, scales = fp8_linear.quantize_rows(x, fp8_linear.group_of(weight))
            if self._uses_library:
                return self._library_product(codes, scales).to(dtype)
            return fp8_linear.fp8_linear(codes, scales, weight, self._bias, out_dtype=dtype)
        if weight.order is not None:
            x = x.index_select(1, weight.order)
        if x.shape[0] <= MOST_ROWS or self._deterministic:
            return packed_linear(
                x,
                weight,
                self._bias,
                out_dtype=dtype,
                batch_invariant=self._deterministic,
                architecture=self._architecture,
            )
        return torch.nn.functional.linear(x, decode_weight(weight, self._dtype), self._bias).to(dtype)

    def _library_product(self, codes: Tensor, scales: Tensor) -> Tensor:
        """bfloat16 [M, N] of E4M3 codes [M, K] with a scale a row."""
        out: Tensor = torch._scaled_mm(
            codes.view(torch.float8_e4m3fn),
            self._weight.codes.view(torch.float8_e4m3fn).t(),
            scale_a=scales,
            scale_b=self._weight.scales,
            bias=self._bias,
            out_dtype=torch.bfloat16,
        )
        return out

    def _library_takes_it(self) -> bool:
        """Whether the library multiplies weights of this shape and these scales on this card: found by trial."""
        num_outputs, width = self._weight.shape
        is_whole = num_outputs % LIBRARY_MULTIPLE == 0 == width % LIBRARY_MULTIPLE
        if not is_whole or self._dtype != torch.bfloat16 or self._weight.scales.shape[0] != 1:
            return False
        device = self._weight.codes.device
        rows = torch.zeros((2 * MOST_ROWS, width), dtype=torch.uint8, device=device)
        try:
            self._library_product(rows, torch.ones((2 * MOST_ROWS, 1), device=device))
        except (RuntimeError, NotImplementedError):
            return False
        return True
