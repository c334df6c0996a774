"""From a model's share of a step plan to the tensors that its decoder and the sampler read.

Owns a row of block table and sampling parameters per request that was seen, so that a step costs a few numpy calls and
one cheap loop over its requests, not over their tokens or pages. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aiexport_edge.engine.core.decode_inputs import ALIGNMENT, TORCH_DTYPES, DecodeInputs
from aiexport_edge.engine.core.pictures import Key, key_of
from aiexport_edge.engine.core.plan import PENDING_ID, Chunk
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.models.adapted import BatchAdapters
from aiexport_edge.engine.models.adapter_tables import ModelAdapters
from aiexport_edge.engine.models.decoder import Batch, ImageTokens
from aiexport_edge.engine.models.vision import Features
from aiexport_edge.kernels.lora import NO_ADAPTER, order_of


@dataclass(frozen=True, slots=True)
class Draws:
    """The rows that a new id is drawn from, in the order of `Batch.rows`: arguments of `sample`, all [S]. A request
    with a draft has several, one after the other."""

    requests: list[Request]
    temperature: Tensor  # float32
    top_k: Tensor  # int32
    top_p: Tensor  # float32
    seeds: Tensor  # int64, the bits of a uint64
    output_index: Tensor  # int64
    token_slots: Tensor  # int64, the requests' rows: where their new ids go on the device (`decode_inputs.py`)

    def __getitem__(self, rows: slice) -> Draws:
        """Some of them."""
        return Draws(
            self.requests[rows],
            self.temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.seeds[rows],
            self.output_index[rows],
            self.token_slots[rows],
        )


_NO_ROWS = np.empty(0, dtype=np.int64)


class BatchBuilder:
    """Builds one model's batches. At most `max_requests` requests are in a step.

    `staging` gives host memory that can be copied to `device` without waiting (`Accelerator.staging`); on a CPU there
    is none, and the batches' tensors are the arrays that were computed. `features` gives those of a picture: not
    needed by a model that sees none.
    """

    def __init__(
        self,
        *,
        tokens_per_page: int,
        context_window: int,
        max_requests: int,
        device: torch.device,
        staging: Callable[[int], Tensor] | None = None,
        features: Callable[[Key], Features] | None = None,
        adapters: ModelAdapters | None = None,
        batch_invariant: bool = False,
    ) -> None:
        self.tokens_per_page = tokens_per_page
        self._features = features
        self._adapters = adapters
        self._batch_invariant = batch_invariant
        self.device = device
        self._staging = staging
        self._row_of: dict[int, int] = {}  # by request handle
        self._free_rows = list(range(max_requests))
        # What a row of block_tables holds: the first so many pages of a request's list.
        self._pages: list[list[int]] = [[] for _ in range(max_requests)]
        self._num_pages = [0] * max_requests
        self._block_tables = np.zeros((max_requests, -(-context_window // tokens_per_page)), dtype=np.int32)
        self._temperature = np.zeros(max_requests, dtype=np.float32)
        self._top_k = np.zeros(max_requests, dtype=np.int32)
        self._top_p = np.ones(max_requests, dtype=np.float32)
        self._seeds = np.zeros(max_requests, dtype=np.uint64)
        self._shift = np.zeros(max_requests, dtype=np.int64)  # from a token's index to its position, past the pictures

    def reserve(self, chunks: Sequence[Chunk]) -> None:
        """Give a row to every request of a step that several batches are built for: none takes another's then."""
        for chunk in chunks:
            if chunk.request.handle not in self._row_of:
                self._admit(chunk.request, chunks)

    def build(self, chunks: Sequence[Chunk]) -> tuple[Batch, Draws]:
        """The batch of `chunks`, one sequence each, in their order; those with drafts are several."""
        ids: list[int] = []
        rows: list[int] = []
        starts: list[int] = []
        counts: list[int] = []
        sampled: list[int] = []
        requests: list[Request] = []
        output_index: list[int] = []
        pictured: list[tuple[int, Chunk]] = []  # chunks of prompts with pictures, after the place of their first token
        for chunk in chunks:
            request, start, count = chunk.request, chunk.start, chunk.num_tokens
            row = self._row(request, chunks)
            if chunk.draft:
                # Each guess is a sequence of its own, one token longer than the one before, in the same pages.
                num_rows = 1 + len(chunk.draft)
                ids += (request.token_ids[start], *chunk.draft)
                rows += [row] * num_rows
                starts += range(start, start + num_rows)
                counts += [1] * num_rows
                sampled += range(len(rows) - num_rows, len(rows))
                requests += [request] * num_rows
                output_index += range(chunk.output_index, chunk.output_index + num_rows)
                continue
            rows.append(row)
            starts.append(start)
            counts.append(count)
            if request.positions is not None and start < request.num_prompt_tokens:
                pictured.append((len(ids), chunk))
            if count == 1:
                ids.append(request.token_ids[start])
            else:
                ids += request.token_ids[start : start + count]
            if chunk.samples:
                sampled.append(len(rows) - 1)
                requests.append(request)
                output_index.append(chunk.output_index)
        batch, draws = self._batch(
            np.array(ids),
            np.array(rows),
            np.array(starts),
            np.array(counts),
            sampled,
            requests,
            np.array(output_index),
            pictured,
        )
        if self._adapters is not None and any(chunk.request.adapter_slot >= 0 for chunk in chunks):
            of_chunks = np.array([chunk.request.adapter_slot for chunk in chunks], dtype=np.int32)
            (slots,) = self._upload(np.repeat(of_chunks, [chunk.num_tokens for chunk in chunks]))
            order = order_of(slots) if slots.device.type == "cpu" else None
            batch = replace(batch, adapters=BatchAdapters(slots, self._adapters.layers, self._batch_invariant, order))
        return batch, draws

    def stage_decodes(self, chunks: Sequence[Chunk], bucket: int, inputs: DecodeInputs, staging: Tensor) -> Draws:
        """Write `chunks`, decodes with their drafts, into `staging` for the first `bucket` rows of `inputs`: a row for
        each token.

        The other rows are padding: sequences of one token in page 0, for which nothing is drawn. An id that
        is still on its way (PENDING_ID) is taken from its slot on the device. The draws are views of `inputs`.
        """
        singles = _single_tokens(chunks)
        requests = [request for request, _, _ in singles]
        ids = np.array([id_ for _, _, id_ in singles])
        rows = np.array([self._row(request, chunks) for request in requests])
        starts = np.array([start for _, start, _ in singles])
        count = len(singles)
        host = inputs.host_rows(staging, bucket)
        for padded in (host.source, host.positions, host.slots, host.block_tables[:, 0]):
            padded[count:] = 0
        host.seq_lens[count:] = 1
        host.adapter_slots[:count] = [request.adapter_slot for request in requests]
        host.adapter_slots[count:] = NO_ADAPTER
        host.host_ids[:count] = ids
        host.source[:count] = np.where(ids == PENDING_ID, rows, inputs.first_host_id + np.arange(count))
        host.positions[:count] = starts + self._shift[rows]
        page_of, offset = np.divmod(starts, self.tokens_per_page)
        host.slots[:count] = self._block_tables[rows, page_of].astype(np.int64) * self.tokens_per_page + offset
        host.seq_lens[:count] = starts + 1
        width = int(page_of.max()) + 1
        host.block_tables[:count, :width] = self._block_tables[rows, :width]
        host.token_slots[:count] = rows
        host.temperature[:count] = self._temperature[rows]
        host.top_k[:count] = self._top_k[rows]
        host.top_p[:count] = self._top_p[rows]
        host.seeds[:count] = self._seeds[rows].view(np.int64)
        host.output_index[:count] = [start + 1 - request.num_prompt_tokens for request, start, _ in singles]
        return Draws(
            requests=requests,
            temperature=inputs.temperature[:count],
            top_k=inputs.top_k[:count],
            top_p=inputs.top_p[:count],
            seeds=inputs.seeds[:count],
            output_index=inputs.output_index[:count],
            token_slots=inputs.token_slots[:count],
        )

    def _batch(
        self,
        ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        counts: npt.NDArray[np.int64],
        sampled: list[int],
        requests: list[Request],
        output_index: npt.NDArray[np.int64],
        pictured: list[tuple[int, Chunk]],
    ) -> tuple[Batch, Draws]:
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
        shifts = self._shift[rows]
        if shifts.any():
            positions += shifts[sequences]
        for at, chunk in pictured:
            assert chunk.request.positions is not None
            of_prompt = chunk.request.positions.of_prompt[:, chunk.start : chunk.start + chunk.num_tokens]
            positions[:, at : at + of_prompt.shape[1]] = of_prompt
        image_rows, pieces = self._image_tokens(pictured)
        drawn = rows[sampled]
        tensors = self._upload(
            ids,
            positions,
            slots,
            block_tables,
            query_start_loc,
            seq_lens.astype(np.int32),
            ends[sampled] - 1,
            self._temperature[drawn],
            self._top_k[drawn],
            self._top_p[drawn],
            self._seeds[drawn].view(np.int64),
            output_index.astype(np.int64),
            drawn,
            image_rows,
        )
        batch = Batch(
            input_ids=tensors[0],
            inputs_embeds=None,
            positions=tensors[1],
            slots=tensors[2],
            block_tables=tensors[3],
            query_start_loc=tensors[4],
            seq_lens=tensors[5],
            rows=None if len(sampled) == num_tokens else tensors[6],
            has_axes=bool(pictured),
            image_tokens=_image_tokens(tensors[-1], pieces) if pieces else None,
        )
        return batch, Draws(requests, *tensors[7:-1])

    def _image_tokens(self, pictured: list[tuple[int, Chunk]]) -> tuple[npt.NDArray[np.int64], list[Features]]:
        """Which tokens of the batch stand for pictures, int64 [M], and the parts of features that they are."""
        if not pictured:
            return _NO_ROWS, []
        assert self._features is not None
        rows: list[npt.NDArray[np.int64]] = []
        pieces: list[Features] = []
        for at, chunk in pictured:
            for index, span in enumerate(chunk.request.spans):
                first, last = max(span.start, chunk.start), min(span.end, chunk.end)
                if first < last:
                    rows.append(np.arange(first, last) + (at - chunk.start))
                    whole = self._features(key_of(chunk.request, index))
                    part = slice(first - span.start, last - span.start)
                    pieces.append(Features(whole.tokens[part], tuple(each[part] for each in whole.deepstack)))
        return (np.concatenate(rows) if rows else _NO_ROWS), pieces

    def _row(self, request: Request, chunks: Sequence[Chunk]) -> int:
        """The request's row, with its pages in the block table."""
        row = self._row_of.get(request.handle)
        if row is None:
            row = self._admit(request, chunks)
        pages = request.pages
        if self._pages[row] is not pages:  # new, or others after a preemption: a list that is held only grows
            self._pages[row], self._num_pages[row] = pages, 0
        known, num_pages = self._num_pages[row], len(pages)
        if known < num_pages:
            self._block_tables[row, known:num_pages] = pages[known:]
            self._num_pages[row] = num_pages
        return row

    def _admit(self, request: Request, chunks: Sequence[Chunk]) -> int:
        """Give `request` a row, taking back those of requests outside this step when none is left."""
        if not self._free_rows:
            current = {chunk.request.handle for chunk in chunks}
            for handle in [handle for handle in self._row_of if handle not in current]:
                self._free_rows.append(self._row_of.pop(handle))
        row = self._free_rows.pop()
        self._row_of[request.handle] = row
        self._pages[row], self._num_pages[row] = [], 0
        sampling = request.sampling
        self._temperature[row] = sampling.temperature
        self._top_k[row] = sampling.top_k
        self._top_p[row] = sampling.top_p
        self._seeds[row] = sampling.seed
        self._shift[row] = 0 if request.positions is None else request.positions.shift
        return row

    def _upload(self, *arrays: npt.NDArray[Any]) -> list[Tensor]:
        """The arrays on the device, by a single copy that is not awaited."""
        if self._staging is None:
            return [torch.from_numpy(array) for array in arrays]
        offsets, size = [], 0
        for array in arrays:
            offsets.append(size)
            size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        staging = self._staging(size)
        host = staging.numpy()
        for offset, array in zip(offsets, arrays, strict=True):
            host[offset : offset + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        memory.copy_(staging, non_blocking=True)
        return [
            memory[offset : offset + array.nbytes].view(TORCH_DTYPES[array.dtype]).view(array.shape)
            for offset, array in zip(offsets, arrays, strict=True)
        ]


def _single_tokens(chunks: Sequence[Chunk]) -> list[tuple[Request, int, int]]:
    """Request, position and id of every token of decodes and their drafts."""
    singles = []
    for chunk in chunks:
        request, start = chunk.request, chunk.start
        singles.append((request, start, request.token_ids[start]))
        for index, guess in enumerate(chunk.draft, 1):
            singles.append((request, start + index, guess))
    return singles


def _image_tokens(rows: Tensor, pieces: list[Features]) -> ImageTokens:
    if len(pieces) == 1:
        return ImageTokens(rows, pieces[0].tokens, pieces[0].deepstack)
    deepstack = zip(*(piece.deepstack for piece in pieces), strict=True)
    return ImageTokens(
        rows, torch.cat([piece.tokens for piece in pieces]), tuple(torch.cat(list(each)) for each in deepstack)
    )
