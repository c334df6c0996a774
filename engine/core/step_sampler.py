"""From a step's logits to its ids on the host: what waits for a mask, draws, and the way back.

Owns the ids of a step from when they are drawn until the host has them. How one is drawn is `kernels/sampler.py`'s,
what may be drawn `constraint.py`'s. Knows no models and no pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aiexport_edge.engine.core.accelerator import Accelerator
from aiexport_edge.engine.core.batch import Draws
from aiexport_edge.engine.core.plan import StepResult
from aiexport_edge.engine.core.request import Status
from aiexport_edge.kernels.sampler import sample

_NO_IDS = torch.empty(0, dtype=torch.int64)
_NO_LOGPROBS = torch.empty(0, dtype=torch.float32)


def _nothing() -> None:
    """There is nothing to wait for."""


@dataclass(frozen=True, slots=True)
class _Undrawn:
    """Rows of a launched step whose ids are drawn when the masks of their constraints are known."""

    model: int
    logits: Tensor  # float32 [rows, vocabulary]
    draws: Draws


@dataclass(slots=True)
class PendingStep:
    """A step that has been launched: whose ids will be in `host_ids` (int64), and the log-probabilities with which they
    were drawn in `host_logprobs` (float32), once `wait` has returned. A handle with a draft comes once for each id that
    was drawn for it, at most `most_ids` of which count where the mask behind them could not be told.
    """

    drafts: dict[int, tuple[int, ...]]  # by handle
    handles: list[int] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)  # on the device, in the order of `handles`
    logprobs: list[Tensor] = field(default_factory=list)
    undrawn: list[_Undrawn] = field(default_factory=list)
    most_ids: dict[int, int] = field(default_factory=dict)  # by handle
    host_ids: Tensor = _NO_IDS
    host_logprobs: Tensor = _NO_LOGPROBS
    wait: Callable[[], None] = _nothing

    def progress(self) -> tuple[int, int]:
        """How much has been drawn or put off; for `take_back`."""
        return len(self.ids), len(self.undrawn)

    def take_back(self, progress: tuple[int, int]) -> None:
        """Forget what has come since."""
        num_drawn, num_undrawn = progress
        num_handles = sum([len(ids) for ids in self.ids[:num_drawn]])
        del self.ids[num_drawn:], self.logprobs[num_drawn:], self.handles[num_handles:], self.undrawn[num_undrawn:]


class StepSampler:
    """`tokens` by model: int64, where the ids of its requests go by their rows (`DecodeInputs.tokens`); none where no
    step needs them there. With `keeps_logits`, `last_logits` holds the float32 logits [vocabulary] that each id of the
    last step was drawn from, by request handle, in memory of their own.
    """

    def __init__(self, accelerator: Accelerator | None, tokens: Sequence[Tensor], *, keeps_logits: bool) -> None:
        self.last_logits: dict[int, Tensor] = {}
        self._accelerator = accelerator
        self._tokens = tokens
        self._keeps_logits = keeps_logits

    def draw_free(self, pending: PendingStep, model: int, logits: Tensor | None, draws: Draws) -> None:
        """Draw from the rows that have no constraint; the others, which are the last, wait."""
        if logits is None:
            return
        requests = draws.requests
        if requests[-1].constraint is None:
            self._draw(pending, model, logits, draws)
            return
        num_free = sum([request.constraint is None for request in requests])
        if num_free:
            self._draw(pending, model, logits[:num_free], draws[:num_free])
        # A copy: another model's graph leaves its logits in the same memory, and kernels expect a row to begin aligned.
        pending.undrawn.append(_Undrawn(model, logits[num_free:].clone(), draws[num_free:]))

    def draw_constrained(self, pending: PendingStep) -> None:
        """Draw from the rows that wait for masks; every id before has been committed."""
        for undrawn in pending.undrawn:
            self._draw(pending, undrawn.model, undrawn.logits, undrawn.draws, self._bitmask(pending, undrawn))
        pending.undrawn = []

    def _bitmask(self, pending: PendingStep, undrawn: _Undrawn) -> Tensor:
        """What the constraints allow, int32 [rows, words]; a request that has ended meanwhile is not asked."""
        num_rows, vocabulary = undrawn.logits.shape
        size = 4 * num_rows * -(-vocabulary // 32)
        host = torch.empty(size, dtype=torch.uint8) if self._accelerator is None else self._accelerator.staging(size)
        masks = host.numpy().view(np.int32).reshape(num_rows, -1)
        row = 0
        while row < num_rows:
            request = undrawn.draws.requests[row]
            draft = pending.drafts.get(request.handle, ())
            end = row + 1 + len(draft)
            if request.status is Status.FINISHED:
                masks[row:end] = -1
            else:
                assert request.constraint is not None
                if draft:
                    pending.most_ids[request.handle] = request.constraint.fill_ahead(masks[row:end], draft)
                else:
                    request.constraint.fill(masks[row])
            row = end
        return host.to(undrawn.logits.device, non_blocking=True).view(torch.int32).view(num_rows, -1)

    def _draw(
        self, pending: PendingStep, model: int, logits: Tensor, draws: Draws, bitmask: Tensor | None = None
    ) -> None:
        """Draw an id from each row and note whose it is; it also goes to its request's slot on the device."""
        drawn, logprobs = sample(
            logits, draws.temperature, draws.top_k, draws.top_p, draws.seeds, draws.output_index, bitmask
        )
        handles = [request.handle for request in draws.requests]
        pending.handles += handles
        pending.ids.append(drawn)
        pending.logprobs.append(logprobs)
        if self._tokens:
            self._tokens[model].index_copy_(0, draws.token_slots, drawn)
        if self._keeps_logits:
            self.last_logits |= dict(zip(handles, logits.clone(), strict=True))

    def send(self, pending: PendingStep) -> None:
        """Set the ids off to the host, with their log-probabilities."""
        if not pending.ids:
            if self._accelerator is not None:
                pending.wait = self._accelerator.mark()  # or steps without ids would be launched far ahead
            return
        ids, logprobs = _joined(pending.ids), _joined(pending.logprobs)
        if self._accelerator is None:
            pending.host_ids, pending.host_logprobs = ids, logprobs
            return
        count = len(pending.handles)
        host = self._accelerator.staging(12 * count)
        pending.host_ids, pending.host_logprobs = (
            host[: 8 * count].view(torch.int64),
            host[8 * count :].view(torch.float32),
        )
        pending.host_ids.copy_(ids, non_blocking=True)
        pending.host_logprobs.copy_(logprobs, non_blocking=True)
        pending.wait = self._accelerator.mark()

    def collect(self, pending: PendingStep) -> StepResult:
        """Wait for a step's ids."""
        assert not pending.undrawn, "draw comes before collect"
        pending.wait()
        drawn = pending.host_ids.tolist()
        broken = np.isnan(pending.host_logprobs.numpy())  # the sampler's word for a row without a distribution
        if pending.drafts:
            return _matched(pending, drawn, broken)
        ids = {handle: [id_] for handle, id_ in zip(pending.handles, drawn, strict=True)}
        if not broken.any():
            return StepResult(ids)
        return StepResult(ids, frozenset(pending.handles[row] for row in np.flatnonzero(broken)))


def _matched(pending: PendingStep, drawn: list[int], broken: npt.NDArray[np.bool_]) -> StepResult:
    """Sample and match: of the ids that were drawn for a draft, those up to the first that is not its guess."""
    ids: dict[int, list[int]] = {}
    faulty = set()
    row = 0
    while row < len(drawn):
        handle = pending.handles[row]
        draft = pending.drafts.get(handle, ())
        count, most = 1, min(pending.most_ids.get(handle, len(draft) + 1), len(draft) + 1)
        while count < most and drawn[row + count - 1] == draft[count - 1]:
            count += 1
        ids[handle] = drawn[row : row + count]
        if broken[row : row + count].any():
            faulty.add(handle)
        row += 1 + len(draft)
    return StepResult(ids, frozenset(faulty))


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
