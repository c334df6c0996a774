"""Adapters beside a model's weights: the factors of every layer on the device, by slot, and copies in host memory.

Owns the bytes: from an adapter's file into host memory, where the least recently used give way, and from there into a
slot. Which adapter belongs into which slot is the scheduler's (`core/adapter_slots.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aiexport_edge.engine.adapters.peft import AdapterError, read_adapter
from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.kernels.lora import LoraTable, table_dtype

Parts = list[tuple[Tensor, Tensor] | None]  # of a fused product: both factors, scaled, or None


@dataclass(frozen=True, slots=True)
class LayerAdapters:
    """The adapters of one layer's products. A mixture of experts has none in its MLP."""

    qkv: LoraTable
    o: LoraTable
    gate_up: LoraTable | None
    down: LoraTable | None

    def by_product(self) -> Mapping[str, LoraTable]:
        """The tables there are, by the product's name (`adapters.peft.PLACES`)."""
        tables = {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}
        return {product: table for product, table in tables.items() if table is not None}


def empty_layers(
    config: ModelConfig, *, num_slots: int, max_rank: int, dtype: torch.dtype, device: torch.device
) -> list[LayerAdapters]:
    """Tables of a model's layers in which every slot is empty. `dtype` is the model's."""
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size

    def table(in_features: int, *part_sizes: int) -> LoraTable:
        return LoraTable.empty(
            num_slots=num_slots,
            max_rank=max_rank,
            in_features=in_features,
            part_sizes=part_sizes,
            dtype=dtype,
            device=device,
        )

    sparse = config.mixture.layers if config.mixture is not None else frozenset()
    return [
        LayerAdapters(
            qkv=table(hidden, q_rows, kv_rows, kv_rows),
            o=table(q_rows, hidden),
            gate_up=None if layer in sparse else table(hidden, inner, inner),
            down=None if layer in sparse else table(inner, hidden),
        )
        for layer in range(config.num_layers)
    ]


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter in host memory: by layer and product, the factors of the product's parts, scaled."""

    parts: Mapping[tuple[int, str], Parts]
    num_bytes: int


class HostAdapters:
    """Adapters of one model in at most `capacity_bytes` of host memory, the one in use not counted."""

    def __init__(self, config: ModelConfig, *, capacity_bytes: int, max_rank: int, dtype: torch.dtype) -> None:
        """`dtype`: what the factors are kept in, that of the tables."""
        self._config = config
        self._capacity_bytes = capacity_bytes
        self._max_rank = max_rank
        self._dtype = dtype
        self._kept: OrderedDict[bytes, HostAdapter] = OrderedDict()
        self._num_bytes = 0

    def get(self, path: str, digest: bytes) -> HostAdapter:
        """The adapter with this digest, read from the directory `path` where it is not here.

        Raises `AdapterError`, also where the directory holds another adapter by now.
        """
        adapter = self._kept.get(digest)
        if adapter is None:
            adapter = self._kept[digest] = self._read(Path(path), digest)
            self._num_bytes += adapter.num_bytes
        self._kept.move_to_end(digest)
        while self._num_bytes > self._capacity_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
        return adapter

    def _read(self, directory: Path, digest: bytes) -> HostAdapter:
        adapter = read_adapter(directory, self._config, max_rank=self._max_rank)
        if adapter.digest != digest:
            raise AdapterError(f"{directory} holds another adapter than the one that was added; add it anew")
        parts: dict[tuple[int, str], Parts] = {}
        num_bytes = 0
        try:
            with safe_open(adapter.weights, framework="pt", device="cpu") as tensors:
                for factors in adapter.factors:
                    a = tensors.get_tensor(factors.a).to(self._dtype, copy=True)
                    b = (tensors.get_tensor(factors.b).float() * factors.scale).to(self._dtype)
                    num_parts = {"qkv": 3, "gate_up": 2}.get(factors.product, 1)
                    parts.setdefault((factors.layer, factors.product), [None] * num_parts)[factors.part] = (a, b)
                    num_bytes += a.nbytes + b.nbytes
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{adapter.weights} cannot be read: {error}") from error
        return HostAdapter(parts, num_bytes)


class ModelAdapters:
    """The adapters of one model: `layers` on the device, with `num_slots` places for ranks up to `max_rank`, the rest
    in `host_bytes` of host memory or on disk. `dtype` is the model's.

    A card's memory is taken at once, that of a CPU by the adapters that are placed there, as much as they need.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_slots: int,
        max_rank: int,
        host_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.max_rank = max_rank
        self._make_layers = partial(
            empty_layers, config, num_slots=num_slots, max_rank=max_rank, dtype=dtype, device=device
        )
        self._layers = None if device.type == "cpu" else self._make_layers()
        self._host = HostAdapters(
            config, capacity_bytes=host_bytes, max_rank=max_rank, dtype=table_dtype(dtype, device)
        )
        self._in_slot: list[bytes] = [b""] * num_slots

    @property
    def layers(self) -> Sequence[LayerAdapters]:
        """The tables. On a CPU they are made when they are first asked for."""
        if self._layers is None:
            self._layers = self._make_layers()
        return self._layers

    def place(self, slot: int, path: str, digest: bytes) -> None:
        """See to it that `slot` holds this adapter. No launched step may read the slot.

        Raises `AdapterError`; the slot is then empty.
        """
        if self._in_slot[slot] == digest:
            return
        self._in_slot[slot] = b""
        for layer in self.layers:
            for table in layer.by_product().values():
                table.clear(slot)
        adapter = self._host.get(path, digest)
        for index, layer in enumerate(self.layers):
            for product, table in layer.by_product().items():
                parts = adapter.parts.get((index, product))
                if parts is not None:
                    table.put(slot, parts)
        self._in_slot[slot] = digest

    def spoil(self, slot: int) -> None:
        """Let whatever runs with `slot` come to nothing: its logits are no numbers, until it is filled anew."""
        self._in_slot[slot] = b""
        table = self.layers[0].qkv
        table.a[slot].fill_(float("nan"))
        table.b[slot].fill_(float("nan"))
        table.ranks[slot] = 1
