"""A decoder's layers with adapters on their products, for one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from aiexport_edge.engine.models.adapter_tables import LayerAdapters
from aiexport_edge.engine.models.decoder import Layer, Mlp
from aiexport_edge.kernels.linear import PackedLinear
from aiexport_edge.kernels.lora import LoraTable, add_lora, order_of


@dataclass(frozen=True, slots=True)
class AdaptedLinear:
    """A product and what each token's adapter adds to it."""

    linear: PackedLinear
    table: LoraTable
    slots: Tensor
    order: Tensor | None
    batch_invariant: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N], of as many tokens as `slots` has."""
        out = self.linear(x).contiguous()
        add_lora(out, x, self.slots, self.table, order=self.order, batch_invariant=self.batch_invariant)
        return out


@dataclass(frozen=True, slots=True)
class BatchAdapters:
    """The adapters of T tokens: `slots` int32 [T], NO_ADAPTER where a token has none, in the tables of `layers`.
    `order`, on a CPU: the tokens by their slots (`kernels.lora.order_of`).
    """

    slots: Tensor
    layers: Sequence[LayerAdapters]
    batch_invariant: bool = False
    order: Tensor | None = None

    def at(self, rows: Tensor) -> BatchAdapters:
        """Of the tokens `rows` (int64 [S]) alone."""
        slots = self.slots[rows]
        return replace(self, slots=slots, order=None if self.order is None else order_of(slots))

    def apply(self, layer: Layer, index: int) -> Layer:
        """The layer, which is number `index`, with adapters on its products."""
        tables, mlp = self.layers[index], layer.mlp
        if isinstance(mlp, Mlp):
            mlp = Mlp(self._adapt(mlp.gate_up, tables.gate_up), self._adapt(mlp.down, tables.down))
        return replace(layer, qkv=self._adapt(layer.qkv, tables.qkv), o=self._adapt(layer.o, tables.o), mlp=mlp)

    def _adapt(self, linear: PackedLinear | AdaptedLinear, table: LoraTable | None) -> AdaptedLinear:
        assert table is not None
        assert isinstance(linear, PackedLinear)
        return AdaptedLinear(linear, table, self.slots, self.order, self.batch_invariant)
