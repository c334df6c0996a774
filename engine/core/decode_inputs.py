"""The fixed device memory that decode graphs read, and its refresh: one copy a step, from one piece of host memory.

Owns the layout. Where the numbers come from is `batch.py`'s; what reads them, `decode_graphs.py`'s.

    device   | tokens: last ids by slot, spare | host ids | source | positions | … | block tables row by row |
    host                                       |<------------------ one copy, up to the rows in use ------->|

`tokens` holds the last id of every request row (slot), written on the device after the sampler, and after them the ids
that the host sent: `source` says, per row of the batch, which of them is its input. So a row can be launched before its
last id has reached the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aiexport_edge.kernels.lora import NO_ADAPTER

ALIGNMENT = 64  # bytes
TORCH_DTYPES = {np.dtype("int64"): torch.int64, np.dtype("int32"): torch.int32, np.dtype("float32"): torch.float32}

# In the order of the memory; block_tables last, so that a copy can end with the rows in use.
_ROW_SECTIONS: tuple[tuple[str, type[Any]], ...] = (
    ("host_ids", np.int64),
    ("source", np.int64),
    ("positions", np.int64),
    ("slots", np.int64),
    ("seeds", np.int64),
    ("output_index", np.int64),
    ("token_slots", np.int64),
    ("seq_lens", np.int32),
    ("adapter_slots", np.int32),
    ("temperature", np.float32),
    ("top_k", np.int32),
    ("top_p", np.float32),
)


@dataclass(frozen=True, slots=True)
class HostRows:
    """numpy views of one staging buffer: [rows] each, block_tables [rows, pages_per_row]. See `DecodeInputs`."""

    host_ids: npt.NDArray[np.int64]
    source: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    seeds: npt.NDArray[np.int64]
    output_index: npt.NDArray[np.int64]
    token_slots: npt.NDArray[np.int64]
    seq_lens: npt.NDArray[np.int32]
    adapter_slots: npt.NDArray[np.int32]
    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    top_p: npt.NDArray[np.float32]
    block_tables: npt.NDArray[np.int32]


class DecodeInputs:
    """Inputs of up to `num_rows` decodes. `num_slots` request rows have a last token.

    On the device: tokens int64 [num_tokens], source, positions, slots, seeds, output_index, token_slots int64
    [num_rows], seq_lens, adapter_slots, top_k int32, temperature, top_p float32 [num_rows], block_tables int32
    [num_rows, pages_per_row]. `first_host_id` is the place in `tokens` of the first id that the host sends.
    """

    def __init__(self, *, num_rows: int, num_slots: int, pages_per_row: int, device: torch.device) -> None:
        self.num_rows = num_rows
        self.first_host_id = _round_up(8 * num_slots) // 8
        self._pages_per_row = pages_per_row
        self._offsets: dict[str, int] = {}
        size = 0
        for name, dtype in _ROW_SECTIONS:
            self._offsets[name] = size
            size = _round_up(size + num_rows * np.dtype(dtype).itemsize)
        self._tables_offset = size
        size += 4 * num_rows * pages_per_row
        head = 8 * self.first_host_id
        memory = torch.zeros(head + size, dtype=torch.uint8, device=device)
        self._refreshed = memory[head:]
        self.tokens = memory[: head + 8 * num_rows].view(torch.int64)
        sections = {name: self._section(name, np.dtype(dtype)) for name, dtype in _ROW_SECTIONS}
        self.source = sections["source"]
        self.positions = sections["positions"]
        self.slots = sections["slots"]
        self.seeds = sections["seeds"]
        self.output_index = sections["output_index"]
        self.token_slots = sections["token_slots"]
        self.seq_lens = sections["seq_lens"]
        self.adapter_slots = sections["adapter_slots"]
        self.temperature = sections["temperature"]
        self.top_k = sections["top_k"]
        self.top_p = sections["top_p"]
        self.block_tables = self._refreshed[self._tables_offset :].view(torch.int32).view(num_rows, pages_per_row)

    def staged_bytes(self, num_rows: int) -> int:
        """The size of the staging buffer for the first `num_rows` rows."""
        return self._tables_offset + 4 * num_rows * self._pages_per_row

    def host_rows(self, staging: Tensor, num_rows: int) -> HostRows:
        """Where to write the first `num_rows` rows in a staging buffer of `staged_bytes(num_rows)`."""
        array = staging.numpy()
        sections: dict[str, Any] = {}
        for name, dtype in _ROW_SECTIONS:
            first = self._offsets[name]
            sections[name] = array[first : first + num_rows * np.dtype(dtype).itemsize].view(dtype)
        tables = array[self._tables_offset :].view(np.int32).reshape(num_rows, self._pages_per_row)
        return HostRows(block_tables=tables, **sections)

    def clear(self) -> None:
        """Make every row padding: a sequence of one token, in page 0, without an adapter."""
        self._refreshed.zero_()
        self.adapter_slots.fill_(NO_ADAPTER)
        self.seq_lens.fill_(1)

    def refresh(self, staging: Tensor) -> None:
        """Copy a staging buffer to the device, without waiting for it."""
        self._refreshed[: staging.shape[0]].copy_(staging, non_blocking=True)

    def _section(self, name: str, dtype: np.dtype[Any]) -> Tensor:
        first = self._offsets[name]
        return self._refreshed[first : first + self.num_rows * dtype.itemsize].view(TORCH_DTYPES[dtype])


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
