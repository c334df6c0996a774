"""Drawing inside vLLM: grammar masks and this project's own draw, as a custom logits processor.

vLLM takes the highest logit of each row (its temperature is 0); this processor has drawn it: temperature, top-k, top-p,
seed and mask are applied here by the same operation as in the native core (`kernels/sampler.py`), whose random number
depends on seed and output index alone. So a reply that is resumed, here or on a native engine, draws on where it was.

Runs in vLLM's worker processes, which make it by its name. What a request asks for comes in its `extra_args`; what a
model's ids spell and which grammars will be asked for come before, by `Announcements`, so that no step waits for a
compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from aiexport_edge.engine.core.constraint import Constraint
from aiexport_edge.engine.core.grammars import Grammars
from aiexport_edge.engine.core.protocol import AddRequest, AddVocabulary, decode_to_core
from aiexport_edge.kernels.sampler import sample

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

REQUEST_ARG = "aiexport_edge"  # of `extra_args`: the `AddRequest`, as a frame's body
FIRST_INDEX_ARG = "aiexport_edge_first_index"  # the output index of the first id that vLLM draws

# One of each process: vLLM makes the processor and the extension of its worker apart from each other.
_grammars = Grammars()


class Announcements:
    """What vLLM's workers are extended by: methods that the frontend calls in each of them."""

    def learn(self, body: bytes) -> None:
        """What the model's ids spell (a frame's body with one `AddVocabulary`)."""
        (words,) = decode_to_core(body)
        assert isinstance(words, AddVocabulary)
        _grammars.learn(words)

    def announce(self, body: bytes) -> None:
        """A grammar that will be asked for: compiled in a thread, found again by the request that has it."""
        (message,) = decode_to_core(body)
        assert isinstance(message, AddRequest)
        _grammars.submit(message)


class _Row:
    """A request in vLLM's batch."""

    __slots__ = ("constraint", "first_index", "handle", "is_waiting", "message", "num_taken", "output_ids")

    def __init__(self, message: AddRequest, first_index: int, output_ids: list[int]) -> None:
        self.message = message
        self.handle = message.handle
        self.first_index = first_index
        self.output_ids = output_ids  # vLLM's own list, which grows
        self.num_taken = 0  # of `output_ids`, those that the constraint has
        self.constraint: Constraint | None = None
        self.is_waiting = message.grammar is not None


class Sampler(LogitsProcessor):
    """See the module. Rows without our arguments (vLLM's own warm-up) stay as they are."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        num_rows = vllm_config.scheduler_config.max_num_seqs
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._waiting: dict[int, _Row] = {}  # by handle: their grammar is being compiled
        self._temperature = np.zeros(num_rows, dtype=np.float32)
        self._top_p = np.ones(num_rows, dtype=np.float32)
        self._top_k = np.zeros(num_rows, dtype=np.int32)
        self._seeds = np.zeros(num_rows, dtype=np.uint64)
        self._num_words = -(-vllm_config.model_config.get_vocab_size() // 32)
        self._warm_up(vllm_config.model_config.get_vocab_size())

    def is_argmax_invariant(self) -> bool:
        """It is the argmax that this changes."""
        return False

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """The frontend is ours and sends what is right."""

    # ------------------------------------------------------------------------------------------------ who is where

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._take_out(index)
        for index, params, _, output_ids in batch_update.added:
            self._take_out(index)
            arguments: dict[str, Any] = params.extra_args or {}
            if REQUEST_ARG in arguments:
                (message,) = decode_to_core(arguments[REQUEST_ARG])
                assert isinstance(message, AddRequest)
                self._put_in(index, _Row(message, arguments[FIRST_INDEX_ARG], output_ids))
        for one, other, direction in batch_update.moved:
            first, second = self._take_out(one), self._take_out(other)
            self._put_in(other, first)
            if direction is MoveDirectionality.SWAP:
                self._put_in(one, second)

    def _take_out(self, index: int) -> _Row | None:
        return self._rows.pop(index, None)

    def _put_in(self, index: int, row: _Row | None) -> None:
        if row is None:
            return
        self._rows[index] = row
        sampling = row.message.sampling
        self._temperature[index] = sampling.temperature
        self._top_p[index] = sampling.top_p
        self._top_k[index] = sampling.top_k
        self._seeds[index] = sampling.seed
        if row.is_waiting and row.handle not in self._waiting:
            self._waiting[row.handle] = row
            _grammars.submit(row.message)

    # ------------------------------------------------------------------------------------------------ a step

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Leaves in each of our rows one id alone, the drawn one. logits: float32 [batch, vocabulary]."""
        if not self._rows:
            return logits
        indices = sorted(index for index in self._rows if index < logits.shape[0])
        rows = [self._rows[index] for index in indices]
        whole = len(indices) == logits.shape[0]
        output_index = np.array([row.first_index + len(row.output_ids) for row in rows], dtype=np.int64)
        chosen = logits if whole else logits[indices]
        ids, _ = sample(
            chosen,
            self._tensor(self._temperature[indices]),
            self._tensor(self._top_k[indices]),
            self._tensor(self._top_p[indices]),
            self._tensor(self._seeds[indices].view(np.int64)),
            self._tensor(output_index),
            self._masks(rows),
        )
        if whole:
            logits.fill_(-torch.inf).scatter_(1, ids.unsqueeze(1), 0.0)
        else:
            logits[indices] = torch.full_like(chosen, -torch.inf).scatter_(1, ids.unsqueeze(1), 0.0)
        return logits

    def _masks(self, rows: list[_Row]) -> torch.Tensor | None:
        """Bits [rows, words] of the ids that may come; None where every one may."""
        if self._waiting:
            self._await_grammars()
        if not any(row.constraint is not None for row in rows):
            return None
        masks = np.full((len(rows), self._num_words), -1, dtype=np.int32)
        for mask, row in zip(masks, rows, strict=True):
            constraint = row.constraint
            if constraint is None:
                continue
            fresh = row.output_ids[row.num_taken :]
            row.num_taken += len(fresh)
            # Once the document is over, what is still drawn is for nobody: the frontend has ended the request.
            if fresh and constraint.advance(fresh).over:
                row.constraint = None
            else:
                constraint.fill(mask)
        return self._tensor(masks)

    def _await_grammars(self) -> None:
        """They were announced, so their compiling began before: this waits for its rest."""
        alive = {row.handle for row in self._rows.values()}
        for handle in [handle for handle in self._waiting if handle not in alive]:
            del self._waiting[handle]
            _grammars.withdraw(handle)
        while self._waiting:
            for prepared in _grammars.ready(at_most_s=1.0):
                row = self._waiting.pop(prepared.message.handle, None)
                if row is not None:
                    row.is_waiting = False
                    row.constraint = None if prepared.is_whole else prepared.constraint

    def _tensor(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def _warm_up(self, vocab_size: int) -> None:
        """Compiles the draw, so that no step waits for it."""
        bits = torch.full((1, self._num_words), -1, dtype=torch.int32, device=self._device)
        for mask in (None, bits):
            sample(
                torch.zeros(1, vocab_size, device=self._device),
                self._tensor(np.ones(1, dtype=np.float32)),
                self._tensor(np.ones(1, dtype=np.int32)),
                self._tensor(np.full(1, 0.5, dtype=np.float32)),
                self._tensor(np.zeros(1, dtype=np.int64)),
                self._tensor(np.zeros(1, dtype=np.int64)),
                mask,
            )
