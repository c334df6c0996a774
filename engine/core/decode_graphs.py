"""One model's decode steps as graphs: one per bucket of batch sizes, from the inputs' fixed memory to the logits.

Owns the buckets, the captured graphs and when they are captured. The sampler comes after, by itself. Knows no device:
see `accelerator.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aiexport_edge.engine.core.accelerator import Accelerator
from aiexport_edge.engine.core.decode_inputs import DecodeInputs
from aiexport_edge.engine.models.adapted import BatchAdapters
from aiexport_edge.engine.models.adapter_tables import ModelAdapters
from aiexport_edge.engine.models.decoder import Batch, Decoder, KVCache


def decode_buckets(largest: int) -> tuple[int, ...]:
    """Batch sizes that have a graph: 1, 2, 4, 8, 12, 16, by 8 to 64, by 16 to 256, by 32 above; `largest` is the last.

    A batch is padded by 15 rows at most up to 256 and by 31 above: rows of a decode cost little beside its weights.
    """
    sizes = [1, 2, 4, 8, 12, 16, *range(24, 65, 8), *range(80, 257, 16), *range(288, largest, 32)]
    return (*[size for size in sizes if size < largest], largest)


def bucket_of(buckets: Sequence[int], num_rows: int) -> int:
    """The smallest bucket that holds `num_rows`."""
    return buckets[bisect_left(buckets, num_rows)]


def first_buckets(buckets: Sequence[int]) -> list[int]:
    """Those captured before the first request, largest first: later ones fit into the memory of earlier ones."""
    return sorted({buckets[-1], *[size for size in buckets if size & (size - 1) == 0]}, reverse=True)


class DecodeGraphs:
    """Graphs over `inputs`. `logits` float32 [rows, vocabulary]: where every graph leaves its result; may be shared.

    With `adapters`, each bucket can have a second graph, `adapted`, for batches in which any row has one.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        decoder: Decoder,
        kv_caches: Sequence[KVCache],
        inputs: DecodeInputs,
        logits: Tensor,
        adapters: ModelAdapters | None = None,
    ) -> None:
        self.buckets = decode_buckets(inputs.num_rows)
        self.inputs = inputs
        self.logits = logits
        self._accelerator = accelerator
        self._decoder = decoder
        self._kv_caches = kv_caches
        self._adapters = adapters
        self._query_start_loc = torch.arange(inputs.num_rows + 1, dtype=torch.int32, device=accelerator.device)
        self._replays: dict[tuple[int, bool], Callable[[], None]] = {}
        self._given_up: set[tuple[int, bool]] = set()

    @property
    def captured(self) -> list[int]:
        """The buckets that have a graph without adapters, in the order of their capture."""
        return [bucket for bucket, adapted in self._replays if not adapted]

    @property
    def has_adapters(self) -> bool:
        """Whether there can be adapted graphs."""
        return self._adapters is not None

    @property
    def first_buckets(self) -> list[int]:
        """Those to be captured before the first request, in this order."""
        return first_buckets(self.buckets)

    @torch.inference_mode()
    def capture(self, bucket: int, adapted: bool = False) -> None:
        """Capture the bucket's graph, unless it is there. It runs on padding: what the inputs held is gone."""
        if (bucket, adapted) in self._replays:
            return
        self.inputs.clear()
        batch, logits = self._batch(bucket, adapted), self.logits[:bucket]

        def run() -> None:
            self._run(batch, logits)

        self._replays[bucket, adapted] = self._accelerator.capture(run)

    def bucket(self, num_rows: int, adapted: bool = False) -> int:
        """The smallest bucket of `num_rows` or more, captured if it is needed for the first time.

        Where memory does not do for another graph, a larger one that is there serves instead.
        """
        first = bucket_of(self.buckets, num_rows)
        for bucket in self.buckets[self.buckets.index(first) :]:
            if (bucket, adapted) in self._replays:
                return bucket
            if (bucket, adapted) not in self._given_up:
                try:
                    self.capture(bucket, adapted)
                    return bucket
                except torch.OutOfMemoryError:
                    if bucket == self.buckets[-1]:
                        raise
                    self._given_up.add((bucket, adapted))
        raise AssertionError("the largest bucket has a graph, or there was an error")

    def launch(self, bucket: int, adapted: bool = False) -> None:
        """Launch the bucket's graph on what the inputs hold when it runs; its logits are then in `logits[:bucket]`.

        The first `bucket` rows of the inputs must have been refreshed after `bucket` gave it.
        """
        self._replays[bucket, adapted]()

    def _batch(self, size: int, adapted: bool) -> Batch:
        """Views of the inputs; `input_ids` only holds the place of what `_run` gathers."""
        inputs = self.inputs
        return Batch(
            input_ids=inputs.source[:size],
            inputs_embeds=None,
            positions=inputs.positions[:size].expand(3, size),
            slots=inputs.slots[:size],
            block_tables=inputs.block_tables[:size],
            query_start_loc=self._query_start_loc[: size + 1],
            seq_lens=inputs.seq_lens[:size],
            rows=None,
            is_decode=True,
            adapters=self._batch_adapters(size) if adapted else None,
        )

    def _batch_adapters(self, size: int) -> BatchAdapters:
        assert self._adapters is not None
        return BatchAdapters(self.inputs.adapter_slots[:size], self._adapters.layers, self._decoder.deterministic)

    def _run(self, batch: Batch, logits: Tensor) -> None:
        assert batch.input_ids is not None
        ids = torch.index_select(self.inputs.tokens, 0, batch.input_ids)
        hidden = self._decoder.forward(replace(batch, input_ids=ids), self._kv_caches)
        logits.copy_(self._decoder.logits(hidden))
