"""One model's steps on a CPU without Python between their operations: programs that are kept, and programs for one run.

A decode's program depends on its number of rows alone and is kept (`decode_programs.py`). A step with longer chunks is
recorded for itself and run once: a few milliseconds of recording, and then no thread sleeps, and none is woken, between
some hundreds of operations. Knows no requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aiexport_edge.engine.models.decode_programs import DecodePrograms
from aiexport_edge.engine.models.decoder import Batch, Decoder, KVCache
from aiexport_edge.kernels.cpu.attention import most_state_bytes
from aiexport_edge.kernels.cpu.program import Arena, Program

BYTES_PER_NUMBER = 4  # of what operations leave for each other: 2 in bfloat16, and as much for pieces between them
SPARE_BYTES = 16 << 20


class StepPrograms:
    """Logits of batches of at most `num_tokens`, with tables of `pages_per_row` and at most `num_rows` wanted rows."""

    def __init__(
        self,
        decoder: Decoder,
        kv_caches: Sequence[KVCache],
        *,
        num_tokens: int,
        num_rows: int,
        pages_per_row: int,
        dtype: torch.dtype,
    ) -> None:
        self._decoder = decoder
        self._kv_caches = kv_caches
        self._decodes = DecodePrograms(decoder, kv_caches, num_rows=num_rows, pages_per_row=pages_per_row, dtype=dtype)
        config = decoder.config
        heads = (2 * config.num_q_heads + 2 * config.num_kv_heads) * config.head_dim
        widths = heads + 4 * config.intermediate_size + 6 * config.hidden_size
        num_wanted = min(num_rows, num_tokens)
        tokens_per_row = pages_per_row * kv_caches[0][0].shape[2]
        states = most_state_bytes(tokens_per_row, config.num_q_heads, config.num_kv_heads, config.head_dim)
        numbers = 2 * num_tokens * widths + 2 * num_wanted * config.vocab_size
        self._arena = Arena(BYTES_PER_NUMBER * numbers + 2 * states + SPARE_BYTES)

    def fits(self, batch: Batch) -> bool:
        """Whether `logits` can do it: every operation of the batch is a kernel of ours."""
        return self._decodes.fits(batch) or (batch.image_tokens is None and batch.adapters is None)

    def logits(self, batch: Batch) -> Tensor | None:
        """float32 [S, vocabulary] of the wanted rows of a batch that fits, None where there are none; the memory of
        the last call's is used again."""
        if self._decodes.fits(batch):
            return self._decodes.logits(batch)
        decoder, kv_caches = self._decoder, self._kv_caches
        batch = replace(batch, input_ids=None, inputs_embeds=decoder.embed(batch))
        plans = decoder.plan(batch, kv_caches)
        program, logits = Program(self._arena), None
        with program.recording():
            hidden = decoder.forward(batch, kv_caches, plans)
            if hidden.shape[0]:
                logits = decoder.logits(hidden)
        program.run()
        return logits
