"""One model's decode steps on a CPU as recorded programs: one per number of rows, from fixed inputs to the logits.

Owns the inputs' memory and the programs. What `decode_graphs.py` is on a card; here a step is small, so a program is
made for every number of rows when it first comes up, and nothing is padded. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aiexport_edge.engine.models.adapted import AdaptedLinear, BatchAdapters
from aiexport_edge.engine.models.decoder import Batch, Decoder, KVCache, Mlp
from aiexport_edge.kernels.cpu.program import Arena, Program
from aiexport_edge.kernels.linear import PackedLinear

MOST_ROWS = 256  # beyond, Python's share of a step is small
SPARE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A program, and where it leaves its logits."""

    program: Program
    logits: Tensor


class DecodePrograms:
    """Logits of batches with one new token per sequence. `num_rows` at most, tables of `pages_per_row`."""

    def __init__(
        self, decoder: Decoder, kv_caches: Sequence[KVCache], *, num_rows: int, pages_per_row: int, dtype: torch.dtype
    ) -> None:
        self._num_rows = min(num_rows, MOST_ROWS)
        self._decoder = decoder
        self._kv_caches = kv_caches
        config = decoder.config
        self._embeds = torch.zeros((self._num_rows, config.hidden_size), dtype=dtype)
        self._positions = torch.zeros((3, self._num_rows), dtype=torch.int64)
        self._slots = torch.zeros(self._num_rows, dtype=torch.int64)
        self._seq_lens = torch.ones(self._num_rows, dtype=torch.int32)
        self._adapter_slots = torch.zeros(self._num_rows, dtype=torch.int32)
        self._adapter_order = torch.zeros(self._num_rows, dtype=torch.int32)
        self._block_tables = torch.zeros((self._num_rows, pages_per_row), dtype=torch.int32)
        heads = (config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
        widths = 4 * config.vocab_size + 64 * (heads + 3 * config.intermediate_size + 4 * config.hidden_size)
        self._arena = Arena(2 * self._num_rows * widths + 8 * self._num_rows * pages_per_row + SPARE_BYTES)
        self._recorded: dict[tuple[int, bool], _Recorded] = {}  # by rows, and whether any has an adapter

    def fits(self, batch: Batch) -> bool:
        """Whether `logits` can do it: all of it decodes, every row is wanted, none is of a picture, nor too many."""
        num_rows = batch.seq_lens.shape[0]
        return not batch.has_axes and batch.rows is None and batch.slots.shape[0] == num_rows <= self._num_rows

    def logits(self, batch: Batch) -> Tensor:
        """float32 [B, vocabulary] of a batch that fits; the memory of the last call's is used again."""
        num_rows, width = batch.block_tables.shape
        self._embeds[:num_rows] = self._decoder.embed(batch)
        self._positions[:, :num_rows] = batch.positions
        self._slots[:num_rows] = batch.slots
        self._seq_lens[:num_rows] = batch.seq_lens
        self._block_tables[:num_rows, :width] = batch.block_tables
        adapters = batch.adapters
        if adapters is not None:
            self._adapter_slots[:num_rows] = adapters.slots
            assert adapters.order is not None
            self._adapter_order[:num_rows] = adapters.order
        key = num_rows, adapters is not None
        if key not in self._recorded:
            self._recorded[key] = self._record(num_rows, adapters)
        recorded = self._recorded[key]
        recorded.program.run()
        return recorded.logits

    def _record(self, num_rows: int, adapters: BatchAdapters | None) -> _Recorded:
        program = Program(self._arena)
        batch = Batch(
            input_ids=None,
            inputs_embeds=self._embeds[:num_rows],
            positions=self._positions[:, :num_rows],
            slots=self._slots[:num_rows],
            block_tables=self._block_tables[:num_rows],
            query_start_loc=torch.arange(num_rows + 1, dtype=torch.int32),
            seq_lens=self._seq_lens[:num_rows],
            rows=None,
            is_decode=True,
            adapters=None if adapters is None else self._at_home(adapters, num_rows),
        )
        with program.recording():
            logits = self._decoder.logits(self._decoder.forward(batch, self._kv_caches))
        # A view that does not keep the memory from the next program: it is read before another one runs.
        return _Recorded(program, self._arena.view(logits.data_ptr(), logits.shape, logits.dtype))

    def _at_home(self, adapters: BatchAdapters, num_rows: int) -> BatchAdapters:
        """Whose tokens are read from this memory."""
        return replace(adapters, slots=self._adapter_slots[:num_rows], order=self._adapter_order[:num_rows])


def can_record(decoder: Decoder) -> bool:
    """Whether every operation of a decode is a kernel of ours: a library's launches are not taken down."""
    products: list[PackedLinear | AdaptedLinear] = [decoder.head]
    for layer in decoder.layers:
        if not isinstance(layer.mlp, Mlp):
            return False  # which experts are read is known only while the step runs
        products += [layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down]
    return all(isinstance(product, PackedLinear) and product.is_own for product in products)
