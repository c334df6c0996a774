"""A checkpoint's weights as a model is served with them: read once, stacked, converted, rounded, packed and let go of.

Owns what becomes of each tensor, and the count of what has been read. Which tensors there must be is
`tensor_names.py`'s, which of them make a layer `loader.py`'s. A weight is packed as soon as it is read, so peak memory
is the packed model plus one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from aiexport_edge.engine.models.checkpoint import DTYPES, Checkpoint
from aiexport_edge.engine.models.config import Mixture, ModelConfig, ModelError
from aiexport_edge.engine.models.tensor_names import (
    EMBEDDING,
    FUSED_DOWN,
    FUSED_GATE_UP,
    FUSIONS,
    HEAD,
    ROUTER,
    check,
    own_name,
)
from aiexport_edge.engine.models.vision_loader import PREFIX as TOWER
from aiexport_edge.kernels.linear import PackedLinear, supports_bf16
from aiexport_edge.kernels.moe import Experts
from aiexport_edge.kernels.quantization import Weight

HEAD_ROUNDING = {"none": "none", "int8": "int8", "int4": "int8", "fp8": "none"}
SERVED_BYTES = {"int8": 1.0, "int4": 0.5, "fp8": 1.0}  # of a number, scales aside

DTYPES_BY_NAME = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Progress = Callable[[int, int], None]


def serving_dtype(requested: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to serve in. "auto" keeps the checkpoint's precision as far as the device multiplies it.

    On a CPU 16-bit weights become bfloat16 where the processor has its products, else float32. Raises ModelError for a
    requested dtype that the device lacks.
    """
    if device.type != "cpu":
        return checkpoint if requested == "auto" else DTYPES_BY_NAME[requested]
    if requested == "auto":
        return torch.bfloat16 if checkpoint != torch.float32 and supports_bf16() else torch.float32
    if requested == "float16":
        raise ModelError("dtype float16 is not served on a CPU; use auto, bfloat16 or float32")
    if requested == "bfloat16" and not supports_bf16():
        raise ModelError("this processor has no bfloat16 products; use dtype auto or float32")
    return DTYPES_BY_NAME[requested]


class Weights:
    """Hands out the decoder's weights: read, stacked, converted, on the device, in memory of their own."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        *,
        dtype: str,
        quantize: str,
        kv_cache_dtype: str,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.device = device
        self._quantize = quantize
        self._checkpoint = checkpoint
        self._found = check(checkpoint, config)
        self._names, self._stored = self._found.names, self._found.stored
        is_made_for_fp8 = config.quantization is not None and config.quantization.fp8_kv_cache
        self.fp8_kv_cache = kv_cache_dtype == "fp8" or is_made_for_fp8
        if self._found.quantized_sources and quantize != "none":
            raise ModelError(
                f"{checkpoint.directory}: the weights are quantized already; leave out quantize, or take the 16-bit "
                "checkpoint"
            )
        entries = [checkpoint.entries[name] for name in self._names.values()]
        stored = [checkpoint.entries[name] for name in self._found.quantized_sources]
        embedding = checkpoint.entries[self._names[EMBEDDING]]
        self.dtype = serving_dtype(dtype, DTYPES[embedding.dtype], device)
        item_bytes = self.dtype.itemsize
        self.nbytes = sum(
            int(math.prod(entry.shape) * SERVED_BYTES.get(self.rounding(name), item_bytes))
            for name, entry in zip(self._names, entries, strict=True)
        ) + sum(entry.nbytes for entry in stored)
        self._num_products = self._num_decoded = self._num_floats = 0
        self._bytes_done = 0
        self._bytes_total = sum(entry.nbytes for entry in (*entries, *stored))
        self._progress = progress
        self._report()

    def rounding(self, name: str) -> str:
        """What the tensor is rounded to while it is packed, "none" where it is no product's weight, or quantized.

        A router stays as it is, since a small error there chooses another expert, and so does an embedding that is only
        looked up. The head, which is the embedding where the two are tied, is what drawing tokens is most sensitive to:
        int8 where all else becomes int4, and not rounded to FP8.
        """
        if self._quantize == "none":
            return "none"
        is_head = name == (EMBEDDING if self.config.tie_word_embeddings else HEAD)
        if is_head:
            return HEAD_ROUNDING[self._quantize]
        dimensions = len(self._checkpoint.entries[self._names[name]].shape)
        is_product = dimensions in (2, 3) and name != EMBEDDING and not name.startswith(TOWER)
        return self._quantize if is_product and not name.endswith(f".{ROUTER}.weight") else "none"

    def parameter(self, *names: str) -> Tensor:
        """The tensors `names` stacked along their first axis."""
        sources = [self._names[name] for name in names]
        entries = [self._checkpoint.entries[source] for source in sources]
        rows = sum(entry.shape[0] for entry in entries)
        target = torch.empty(rows, *entries[0].shape[1:], dtype=self.dtype, device=self.device)
        first = 0
        for source, entry in zip(sources, entries, strict=True):
            target[first : first + entry.shape[0]].copy_(self._checkpoint.tensor(source))
            first += entry.shape[0]
            self._bytes_done += entry.nbytes
        self._report()
        return target

    def rows(self, *names: str) -> list[Tensor]:
        """The tensors `names`, on a CPU as they lie in their files: for what packs and keeps none of them."""
        if self.device.type != "cpu":
            return [self.parameter(*names)]
        tensors = []
        for name in names:
            source = self._names[name]
            tensors.append(self._checkpoint.tensor(source))
            self._bytes_done += self._checkpoint.entries[source].nbytes
        self._report()
        return tensors

    def weights(self, *names: str) -> list[Weight]:
        """`rows`, and those that are quantized as they are."""
        weights: list[Weight] = []
        for name in names:
            stored = self._stored.get(name)
            if stored is None:
                weights += self.rows(name)
                continue
            weight = stored.read(self._checkpoint).to(self.device)
            self._num_floats += isinstance(weight, Tensor)
            weights.append(weight)
            self._bytes_done += sum(self._checkpoint.entries[source].nbytes for source in stored.names)
        self._report()
        return weights

    def own(self, tensor: Tensor) -> Tensor:
        """One of `rows` in the model's dtype and in memory of its own."""
        return tensor.to(self.dtype, copy=True) if self.device.type == "cpu" else tensor

    def linear(self, prefix: str, product: str, *, bias: bool, deterministic: bool) -> PackedLinear:
        """The layer `prefix`'s product, fused from its parts where FUSIONS says so."""
        parts = [f"{prefix}.{part}" for part in FUSIONS.get(product, (product,))]
        weight = self.weights(*(f"{part}.weight" for part in parts))
        bias_rows = self.parameter(*(f"{part}.bias" for part in parts)) if bias else None
        return self.product(weight, bias_rows, self.rounding(f"{parts[0]}.weight"), deterministic=deterministic)

    def experts(self, prefix: str, mixture: Mixture, *, deterministic: bool) -> Experts:
        """The layer `prefix`'s experts."""
        each = self._fused_experts if self._found.has_fused_experts else self._single_experts
        made = Experts(each(prefix, mixture), dtype=self.dtype, deterministic=deterministic, quantize=self._quantize)
        self._num_products += 2 * mixture.num_experts
        self._num_decoded += 2 * mixture.num_experts * made.is_decoded
        return made

    def _single_experts(self, prefix: str, mixture: Mixture) -> Iterator[tuple[list[Weight], Weight]]:
        for expert in range(mixture.num_experts):
            gate, up, down = (f"{prefix}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down"))
            yield self.weights(gate, up), self.weights(down)[0]

    def _fused_experts(self, prefix: str, mixture: Mixture) -> Iterator[tuple[list[Weight], Weight]]:
        """Out of one tensor for all: [experts, rows, columns] or each transposed."""
        inner, hidden = mixture.intermediate_size, self.config.hidden_size
        wanted = {f"{prefix}.{FUSED_GATE_UP}": (2 * inner, hidden), f"{prefix}.{FUSED_DOWN}": (hidden, inner)}
        # Of a square tensor the other one tells.
        is_turned = any(name in self._names and self._shape(name)[1:] != shape for name, shape in wanted.items())
        gate_up, down_proj = (self._of_each_expert(name, is_turned=is_turned) for name in wanted)
        for both, down in zip(gate_up, down_proj, strict=True):
            yield list(both.chunk(2)) if isinstance(both, Tensor) else [both], down
            self._report()

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.entries[self._names[name]].shape

    def _of_each_expert(self, name: str, *, is_turned: bool) -> Iterator[Weight]:
        fused = self._found.fused.get(name)
        entries = [self._checkpoint.entries[source] for source in (fused.names if fused else [self._names[name]])]
        nbytes = sum(entry.nbytes for entry in entries) // entries[0].shape[0]
        if fused is not None:
            for weight in fused.read(self._checkpoint):
                yield weight.to(self.device)
                self._bytes_done += nbytes
            return
        for expert in self._checkpoint.tensor(self._names[name]):
            own = (expert.t() if is_turned else expert).contiguous()
            yield own if self.device.type == "cpu" else own.to(self.device, self.dtype)
            self._bytes_done += nbytes

    def plain_product(self, prefix: str, *, deterministic: bool) -> PackedLinear:
        """The product `prefix`, never rounded: rows by whatever is behind them."""
        (weight,) = self.rows(f"{prefix}.weight")
        bias = self.parameter(f"{prefix}.bias")
        return PackedLinear([weight.flatten(1)], bias, dtype=self.dtype, deterministic=deterministic)

    def product(
        self, weight: Sequence[Weight], bias: Tensor | None, rounding: str, *, deterministic: bool
    ) -> PackedLinear:
        """The product with these weights' rows, packed, and rounded."""
        made = PackedLinear(weight, bias, dtype=self.dtype, deterministic=deterministic, quantize=rounding)
        self._num_products += 1
        self._num_decoded += made.is_decoded
        return made

    def kv_scale(self, prefix: str, name: str) -> Tensor | None:
        """float32 [KV heads], what the layer's codes of keys or values are multiplied by; None where they are floats.

        Without a scale in the checkpoint it is 1: E4M3 reaches 448, which keys and values hardly do.
        """
        if not self.fp8_kv_cache:
            return None
        source = own_name(f"{prefix}.self_attn.{name}", self.config)
        scales = torch.ones(self.config.num_kv_heads)
        if source in self._checkpoint.entries:
            scales *= self._checkpoint.tensor(source).float().flatten()
        if not bool((scales > 0).all()) or not bool(scales.isfinite().all()):
            raise ModelError(
                f"{self._checkpoint.directory}: {source} is {scales.tolist()}; positive numbers are needed"
            )
        return scales.to(self.device)

    def note(self) -> str:
        """What of the weights' form this device has no products for; "" where there is nothing to say."""
        decoded = self._num_decoded + self._num_floats
        if decoded:
            name = str(self.dtype).removeprefix("torch.")
            return (
                f"{decoded} of {self._num_products} products have quantized weights that this device does not "
                f"multiply: they were decoded, and take the memory and the time of {name}"
            )
        sources = self._found.quantized_sources
        is_fp8 = self._quantize == "fp8" or any(self._checkpoint.entries[name].dtype == "F8_E4M3" for name in sources)
        if is_fp8 and self.device.type == "cuda":
            from aiexport_edge.kernels.gpu.quantized_product import multiplies_fp8

            if not multiplies_fp8(self.device):
                return "this card does not multiply FP8: weights in FP8 stay so in memory and are decoded by their bits"
        return ""

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(self._bytes_done, self._bytes_total)
