"""Matrix products: weights packed once for the processor; cuBLAS on a GPU.

On a CPU they are our own (`kernels.cpu`) where it multiplies bfloat16 pairs but has no tile unit, and for weights in
eight and four bits; else oneDNN's, through torch. A library chooses its loops by the number of rows, so a row's bits
change with the batch that it is in. In deterministic mode a library's rows are cut and padded into tiles of a few
sizes, found by trial once per shape (`tiling.py`). Our own products need none of that. Knows nothing of models.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from aiexport_edge.kernels.quantization import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    Weight,
    int8_weight,
    quantize_fp8,
    quantize_int4,
    quantize_int8,
    stack,
)
from aiexport_edge.kernels.threads import sharing
from aiexport_edge.kernels.tiling import Product, find_tiling, trial_operands

QUANTIZATIONS = ("none", "int8", "int4", "fp8")
NANOSECONDS = 0.02  # for a product and a sum of floats, on one thread
INT8_BLOCK = 64
CARD_INT4_GROUP = 128  # inputs that share a scale where a card's weights are rounded: it is short of memory


def supports_bf16() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself (AVX512-BF16, AMX, or Arm's BF16 extension)."""
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return True
    is_arm = torch.backends.cpu.get_cpu_capability().startswith("SVE")
    return is_arm and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times weightᵀ, weight [N, K], plus bias [N], in float32 inside. Returns [M, N] in x's dtype."""
    out = x.float() @ weight.float().t()
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype)


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What products run in: `dtype` on a GPU and where oneDNN has it on this processor, else float32."""
    if device.type != "cpu":
        return dtype
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    if dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return dtype
    return torch.float32


def _pack(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    """The product with this weight, which is not kept where it can be packed."""
    if weight.is_cuda or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return lambda x: torch.nn.functional.linear(x, weight, bias)
    packed, size = torch.ops.mkldnn._reorder_linear_weight(weight), weight.numel()

    def product(x: torch.Tensor) -> torch.Tensor:
        with sharing(x.shape[0] * size * NANOSECONDS):
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return out

    return product


@functools.cache
def _find_tiling(
    out_features: int, in_features: int, dtype: torch.dtype, has_bias: bool, num_threads: int, device: torch.device
) -> tuple[int, ...]:
    """`find_tiling` of products of this shape."""
    weight, rows = trial_operands(out_features, in_features, dtype, device)
    product = _pack(weight, torch.zeros(out_features, dtype=dtype, device=device) if has_bias else None)
    del weight
    return find_tiling(product, rows, num_threads)


class OwnProduct(Protocol):
    """A weight in a packing of our own. `multiply` runs kernels whose launches can be recorded."""

    def multiply(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [M, K] -> [M, N] in `dtype`."""
        ...


@runtime_checkable
class _Gathers(Protocol):
    def gather(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...


def _pack_own(
    parts: Sequence[torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype, *, quantized: bool
) -> OwnProduct | None:
    """The weight in our own packing, None where this processor's products are a library's."""
    if parts[0].device.type != "cpu":
        return None
    if not quantized and (dtype != torch.bfloat16 or torch.cpu._is_amx_tile_supported()):
        return None
    from aiexport_edge.kernels.cpu import dot

    if not (dot.HAS_INT8 if quantized else dot.HAS_BFLOAT16):
        return None
    from aiexport_edge.kernels.cpu.packed_weight import PackedWeight

    return PackedWeight(parts, bias, quantized=quantized)


def round_for_card(weight: torch.Tensor, quantize: str) -> QuantizedWeight:
    """A float weight [N, K] rounded as a card multiplies it; `quantize` is not "none"."""
    if quantize == "int8":
        return int8_weight(weight)
    return quantize_fp8(weight) if quantize == "fp8" else quantize_int4(weight, CARD_INT4_GROUP)


def _quantized(parts: Sequence[Weight], dtype: torch.dtype, quantize: str) -> QuantizedWeight | None:
    """The weight in the form that its device multiplies: as it came, or rounded as `quantize` asks; None: in floats.

    A CPU's int8 products round the weights themselves, part by part.
    """
    is_on_cpu = parts[0].device.type == "cpu"
    rounds = quantize in (("int4", "fp8") if is_on_cpu else ("int8", "int4", "fp8"))
    if all(isinstance(part, torch.Tensor) for part in parts) and not rounds:
        return None
    weight = stack(parts, dtype)
    if not isinstance(weight, torch.Tensor):
        return weight
    if not rounds:
        return None
    if not is_on_cpu:
        return round_for_card(weight, quantize)
    if quantize == "fp8":
        return quantize_fp8(weight)
    from aiexport_edge.kernels.cpu import int4_products

    return int4_products.round_weight(weight)


def _pack_bits(
    weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype, *, deterministic: bool
) -> OwnProduct | None:
    """The weight in our own packing, None where its device has no products for it: there it is decoded."""
    if weight.device.type == "cpu":
        return _pack_bits_on_cpu(weight, bias)
    if weight.device.type != "cuda":
        return None
    from aiexport_edge.kernels.gpu import quantized_product

    if not quantized_product.fits(weight, dtype):
        return None
    return quantized_product.CardProduct(weight, bias, dtype=dtype, deterministic=deterministic)


def _pack_bits_on_cpu(weight: QuantizedWeight, bias: torch.Tensor | None) -> OwnProduct | None:
    if isinstance(weight, Int4Weight):
        from aiexport_edge.kernels.cpu import int4_products

        return int4_products.PackedInt4(weight, bias) if int4_products.fits(weight) else None
    if isinstance(weight, Int8Weight) and weight.is_per_output and weight.order is None:
        from aiexport_edge.kernels.cpu import dot

        if dot.HAS_INT8:
            from aiexport_edge.kernels.cpu.packed_weight import PackedWeight

            return PackedWeight.of_codes(weight, bias)
    return None


def _pack_quantized(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> tuple[Product, Product]:
    """The product with this weight in int8, one scale per output, and its rows: torch's, on `dtype`."""
    num_outputs, width = weight.shape
    # It reads whole blocks, past the end of weights that are no multiple of them.
    missing = -width % INT8_BLOCK
    values, scales = quantize_int8(torch.nn.functional.pad(weight, (0, missing, 0, -num_outputs % INT8_BLOCK)))
    factors = scales.to(dtype)

    def product(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.pad(x, (0, missing)).contiguous()
        out: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, values, factors)[:, :num_outputs]
        return out if bias is None else out + bias

    def gather(ids: torch.Tensor) -> torch.Tensor:
        return (values.index_select(0, ids) * scales[ids, None])[:, :width]

    return product, gather


class PackedLinear:
    """y = x Wᵀ + b, with W packed: the caller may drop the weight it came from.

    Where the processor has no products of `dtype`, the weight is packed in float32 and x is converted. With
    `deterministic`, the bits of a row of y depend on that row of x alone: not on other rows, its place among them or
    the number of threads. Set that number before (`aiexport_edge.kernels.threads.set_num_threads`). With `quantize` W
    is rounded (`kernels.quantization`): "int8" with a scale per output, "int4" with a scale and a zero per 32 inputs
    (128 on a card), "fp8" to E4M3 with a scale per output. A CPU has products in int8 and int4; FP8 it decodes into
    `dtype`. A card has all of them (`kernels.gpu.quantized_product`).
    """

    def __init__(
        self,
        weight: Weight | Sequence[Weight],
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype,
        deterministic: bool,
        quantize: str = "none",
    ) -> None:
        """weight [N, K], or parts of it to be stacked along N, in any float dtype or quantized; bias [N], any float."""
        assert quantize in QUANTIZATIONS
        given = [weight] if isinstance(weight, torch.Tensor | Int4Weight | Int8Weight | Fp8Weight) else list(weight)
        self.out_features, self.in_features = sum(part.shape[0] for part in given), given[0].shape[1]
        self.dtype = dtype
        self.deterministic = deterministic
        self._tiling: tuple[int, ...] = ()
        self._gather: Product | None = None
        self._own: OwnProduct | None = None
        self.is_decoded = False  # quantized weights that are multiplied in floats
        in_bits = _quantized(given, dtype, quantize)
        if in_bits is not None:
            self._own = _pack_bits(in_bits, bias, dtype, deterministic=deterministic)
            if self._own is not None:
                return
            given, quantize, self.is_decoded = [in_bits.dequantize(dtype)], "none", True
        del in_bits, weight
        parts = [part if isinstance(part, torch.Tensor) else part.dequantize(dtype) for part in given]
        del given
        self._own = _pack_own(parts, bias, dtype, quantized=quantize == "int8")
        if self._own is not None:
            return
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
        if quantize == "int8":
            self._product_dtype = dtype
            self._product, self._gather = _pack_quantized(weight, None if bias is None else bias.to(dtype), dtype)
            return
        self._product_dtype = _product_dtype(dtype, weight.device)
        self._product = _pack(
            weight.to(self._product_dtype), None if bias is None else bias.to(self._product_dtype).contiguous()
        )
        if deterministic:
            num_threads = torch.get_num_threads() if weight.device.type == "cpu" else 1
            self._tiling = _find_tiling(
                self.out_features, self.in_features, self._product_dtype, bias is not None, num_threads, weight.device
            )

    @property
    def is_own(self) -> bool:
        """Whether its products are our own kernels, whose launches can be recorded (`kernels.threads.recording`)."""
        return self._own is not None

    @property
    def gathers(self) -> bool:
        """Whether `gather` gives the weight's rows, so that an embedding that is tied to it need not be kept."""
        return isinstance(self._own, _Gathers) or self._gather is not None

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` (int64 [T]) of W as products have them, [T, K] in `dtype`. Raises IndexError beyond [0, N)."""
        if isinstance(self._own, _Gathers):
            return self._own.gather(ids, self.dtype)
        assert self._gather is not None
        return self._gather(ids).to(self.dtype)

    def __call__(self, x: torch.Tensor, *, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        """x [M, K] in `dtype` -> [M, N] in `out_dtype`, or in `dtype`."""
        assert x.dtype == self.dtype
        if self._own is not None:
            return self._own.multiply(x, out_dtype or self.dtype)
        x = x.to(self._product_dtype).contiguous()
        if not self._tiling:
            out = self._product(x)
        elif x.shape[0] <= self._tiling[-1]:
            out = self._tile(x)
        else:
            out = torch.cat([self._tile(rows) for rows in torch.split(x, self._tiling[-1])])
        return out.to(out_dtype or self.dtype)

    def _tile(self, x: torch.Tensor) -> torch.Tensor:
        """At most a largest tile of rows, padded up to the next size of tile."""
        num_rows = x.shape[0]
        size = next(size for size in self._tiling if size >= num_rows)
        if size == num_rows:
            return self._product(x)
        return self._product(torch.nn.functional.pad(x, (0, 0, 0, size - num_rows)))[:num_rows]
