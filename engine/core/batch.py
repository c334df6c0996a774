"""From a model's share of a step plan to the tensors that its decoder and the sampler read.

Owns a row of block table and sampling parameters per request that was seen, so that a step costs a few numpy calls and
one cheap loop over its requests, not over their tokens or pages. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aiexport_edge.engine.core.plan import Chunk
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.models.decoder import Batch


@dataclass(frozen=True, slots=True)
class Draws:
    """The rows that a new id is drawn from, in the order of `Batch.rows`: arguments of `sample`, all [S]."""

    handles: list[int]
    temperature: Tensor  # float32
    top_k: Tensor  # int32
    top_p: Tensor  # float32
    seeds: Tensor  # int64, the bits of a uint64
    output_index: Tensor  # int64


class BatchBuilder:
    """Builds one model's batches. At most `max_requests` requests are in a step."""

    def __init__(self, *, tokens_per_page: int, context_window: int, max_requests: int, device: torch.device) -> None:
        self.tokens_per_page = tokens_per_page
        self.device = device
        self._row_of: dict[int, int] = {}  # by request handle
        self._free_rows = list(range(max_requests))
        self._pages: list[list[int]] = [[] for _ in range(max_requests)]  # what the row of block_tables holds
        self._block_tables = np.zeros((max_requests, -(-context_window // tokens_per_page)), dtype=np.int32)
        self._temperature = np.zeros(max_requests, dtype=np.float32)
        self._top_k = np.zeros(max_requests, dtype=np.int32)
        self._top_p = np.ones(max_requests, dtype=np.float32)
        self._seeds = np.zeros(max_requests, dtype=np.uint64)

    def build(self, chunks: Sequence[Chunk]) -> tuple[Batch, Draws]:
        """The batch of `chunks`, one sequence each, in their order."""
        ids: list[int] = []
        rows: list[int] = []
        starts: list[int] = []
        counts: list[int] = []
        sampled: list[int] = []
        handles: list[int] = []
        output_index: list[int] = []
        for sequence, chunk in enumerate(chunks):
            request, start, count = chunk.request, chunk.start, chunk.num_tokens
            row = self._row_of.get(request.handle)
            if row is None:
                row = self._admit(request, chunks)
            if self._pages[row] != request.pages:  # pages appended, or others after a preemption
                self._pages[row] = list(request.pages)
                self._block_tables[row, : len(request.pages)] = request.pages
            rows.append(row)
            starts.append(start)
            counts.append(count)
            if count == 1:
                ids.append(request.token_ids[start])
            else:
                ids += request.token_ids[start : start + count]
            if chunk.samples:
                sampled.append(sequence)
                handles.append(request.handle)
                output_index.append(request.num_output_tokens)
        return (
            self._batch(np.array(ids), np.array(rows), np.array(starts), np.array(counts), sampled),
            self._draws(np.array(rows)[sampled], handles, output_index),
        )

    def _batch(
        self,
        ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        sampled: list[int],
    ) -> Batch:
        num_tokens, num_sequences = len(ids), len(rows)
        ends = np.cumsum(counts)
        seq_lens = starts + counts
        block_tables = self._block_tables[rows, : -(-int(seq_lens.max()) // self.tokens_per_page)]
        if num_tokens == num_sequences:
            sequences, token_positions = np.arange(num_sequences), starts
        else:
            sequences = np.repeat(np.arange(num_sequences), counts)
            token_positions = np.arange(num_tokens) + np.repeat(seq_lens - ends, counts)
        page_of, offset = np.divmod(token_positions, self.tokens_per_page)
        slots = block_tables[sequences, page_of].astype(np.int64) * self.tokens_per_page + offset
        query_start_loc = np.zeros(num_sequences + 1, dtype=np.int32)
        query_start_loc[1:] = ends
        positions = np.empty((3, num_tokens), dtype=np.int64)
        positions[:] = token_positions
        return Batch(
            input_ids=self._tensor(ids),
            inputs_embeds=None,
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            block_tables=self._tensor(block_tables),
            query_start_loc=self._tensor(query_start_loc),
            seq_lens=self._tensor(seq_lens.astype(np.int32)),
            rows=None if len(sampled) == num_tokens else self._tensor(ends[sampled] - 1),
        )

    def _draws(self, rows: npt.NDArray[np.int64], handles: list[int], output_index: list[int]) -> Draws:
        return Draws(
            handles=handles,
            temperature=self._tensor(self._temperature[rows]),
            top_k=self._tensor(self._top_k[rows]),
            top_p=self._tensor(self._top_p[rows]),
            seeds=self._tensor(self._seeds[rows].view(np.int64)),
            output_index=self._tensor(np.array(output_index, dtype=np.int64)),
        )

    def _admit(self, request: Request, chunks: Sequence[Chunk]) -> int:
        """Give `request` a row, taking back those of requests outside this step when none is left."""
        if not self._free_rows:
            current = {chunk.request.handle for chunk in chunks}
            for handle in [handle for handle in self._row_of if handle not in current]:
                self._free_rows.append(self._row_of.pop(handle))
        row = self._free_rows.pop()
        self._row_of[request.handle] = row
        self._pages[row] = []
        sampling = request.sampling
        self._temperature[row] = sampling.temperature
        self._top_k[row] = sampling.top_k
        self._top_p[row] = sampling.top_p
        self._seeds[row] = sampling.seed
        return row

    def _tensor(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device)
