"""Runs step plans on the device: batches, decoders, sampler.

Owns the models' weights and the pool's memory. Decides nothing: what runs, and in which pages, is in the plan. Knows no
text. On a card, a step is launched and its ids are collected later: decodes are graphs, prefills are launched after
them, ids stay in slots on the device for the next step and travel to the host meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aiexport_edge.engine.adapters.peft import AdapterError
from aiexport_edge.engine.core.accelerator import Accelerator
from aiexport_edge.engine.core.batch import BatchBuilder, Draws
from aiexport_edge.engine.core.decode_graphs import DecodeGraphs
from aiexport_edge.engine.core.decode_inputs import DecodeInputs
from aiexport_edge.engine.core.drafts import MOST_GUESSES, DraftCost
from aiexport_edge.engine.core.encoder import Encoder, eyes_of, picture_bytes
from aiexport_edge.engine.core.kv_memory import KVMemory
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan, StepResult
from aiexport_edge.engine.core.prefill_pace import PrefillPace
from aiexport_edge.engine.core.protocol import AdapterRoom, CoreConfig
from aiexport_edge.engine.core.request import Status
from aiexport_edge.engine.core.warm_up import Progress, dummy_request, largest_steps, warm_up
from aiexport_edge.engine.core.warm_up_pictures import hold_largest_picture
from aiexport_edge.engine.models.adapter_tables import ModelAdapters
from aiexport_edge.engine.models.cost import attention_span
from aiexport_edge.engine.models.loader import LoadedModel
from aiexport_edge.kernels.sampler import sample

if TYPE_CHECKING:
    from aiexport_edge.engine.models.step_programs import StepPrograms


_NO_IDS = torch.empty(0, dtype=torch.int64)
_NO_LOGPROBS = torch.empty(0, dtype=torch.float32)


def _nothing() -> None:
    """There is nothing to wait for."""


def untold(done: int, total: int) -> None:
    """Nobody wants to know."""


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

    handles: list[int]
    ids: list[Tensor]  # on the device, in the order of `handles`
    logprobs: list[Tensor]
    undrawn: list[_Undrawn]
    host_ids: Tensor
    host_logprobs: Tensor
    wait: Callable[[], None]
    drafts: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by handle
    most_ids: dict[int, int] = field(default_factory=dict)  # by handle


class Runner:
    """Every model of one core, on one device, over one pool of pages.

    `num_pages` (page 0 included, which is never to be handed out), `page_bytes`, `max_step_tokens`, `max_num_running`,
    `num_models`; `tokens_per_page`, `context_windows` and `weight_bytes` by model; `memory` is what the pages lie in.
    With `keep_logits`, `last_logits` holds the float32 logits [vocabulary] that each id of the last step was drawn
    from, by request handle: for tests. With an `accelerator`, decodes are graphs, unless `graphed` is off. `adapters`
    by model, None where it has none; `adapter_room` is what each has for them.
    """

    def __init__(
        self,
        config: CoreConfig,
        models: Sequence[LoadedModel],
        memory: KVMemory,
        *,
        keep_logits: bool = False,
        accelerator: Accelerator | None = None,
        graphed: bool = True,
        adapters: Sequence[ModelAdapters | None] = (),
    ) -> None:
        self.memory = memory
        self.num_pages = memory.shape.num_pages
        self.page_bytes = memory.shape.page_bytes
        self.tokens_per_page = list(memory.shape.tokens_per_page)
        self.weight_bytes = [model.weight_bytes for model in models]
        self.num_models = len(models)
        self.context_windows = [model.context_window for model in models]
        self.max_step_tokens = config.max_step_tokens
        self.max_num_running = config.max_num_running
        self.pace = _pace(config, models, memory.bytes.device)
        # Decodes of one step; one that runs alone has rows for a draft.
        self._most_rows = max(config.max_num_running, 1 + MOST_GUESSES) if config.drafts else config.max_num_running
        self.draft_cost = _draft_cost(models, memory.bytes.device, self._most_rows) if config.drafts else None
        self.keep_logits = keep_logits
        self.last_logits: dict[int, Tensor] = {}
        self._models = list(models)
        self._kv_caches = [
            memory.layers(
                index,
                num_layers=model.config.num_layers,
                num_kv_heads=model.config.num_kv_heads,
                head_dim=model.config.head_dim,
                dtype=model.kv_dtype,
            )
            for index, model in enumerate(models)
        ]
        self._adapters = list(adapters) or [None] * len(models)
        self.adapter_room = next((of_model.room for of_model in self._adapters if of_model), AdapterRoom())
        self.eyes = [eyes_of(model, config.max_image_tokens) for model in models]
        self.picture_bytes = picture_bytes(self.eyes)
        self._encoder = Encoder([model.tower for model in models], accelerator)
        self._builders = [
            BatchBuilder(
                tokens_per_page=tokens_per_page,
                context_window=model.context_window,
                max_requests=config.max_num_running,
                device=memory.bytes.device,
                staging=None if accelerator is None else accelerator.staging,
                features=self._encoder.features,
                adapters=of_model,
                batch_invariant=model.decoder.deterministic,
            )
            for model, tokens_per_page, of_model in zip(models, self.tokens_per_page, self._adapters, strict=True)
        ]
        self._accelerator = accelerator
        self._graphs = self._make_graphs(accelerator) if accelerator is not None and graphed else []
        self._programs = self._make_programs() if accelerator is None and graphed else []

    def has_adapters(self, model: int) -> bool:
        """Whether the model has places for adapters."""
        return self._adapters[model] is not None

    @property
    def overlaps(self) -> bool:
        """See `StepRunner`: on a card, ids that have not reached the host are taken from where they were drawn."""
        return bool(self._graphs)

    def step(self, plan: StepPlan) -> StepResult:
        """Compute every chunk of `plan` and draw an id for each that samples. Blocks until the ids are here."""
        pending = self.launch(plan)
        self.draw(pending)
        return self.collect(pending)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Begin a step. On a card this does not wait for anything, and the next step may be launched before `collect`.

        A decode's input may then be PENDING_ID in its request's token_ids, if the request drew an id in the step that
        was launched last. Decodes are replayed and drawn in the first stream, prefills run and are drawn beside them.
        """
        self.last_logits = {}
        self._place_adapters(plan)
        pending = PendingStep([], [], [], [], _NO_IDS, _NO_LOGPROBS, _nothing)
        for model_plan in plan.models:
            pending.drafts |= {chunk.request.handle: chunk.draft for chunk in model_plan.chunks if chunk.draft}
        self._encoder.drop(plan.dropped)
        if self._accelerator is None:
            for model_plan in plan.models:
                for encode in model_plan.encodes:
                    self._encoder.advance(encode)
                if model_plan.chunks:
                    self._draw_free(
                        pending, model_plan.model, *self._run(model_plan.model, _ordered(model_plan.chunks))
                    )
        else:
            self._launch_streams(self._accelerator, plan, pending)
        if not pending.undrawn:
            self._send(pending)
        return pending

    def _place_adapters(self, plan: StepPlan) -> None:
        """Bring the adapters of the plan's requests into their slots. One that cannot be read ends its requests."""
        for model_plan in plan.models:
            adapters = self._adapters[model_plan.model]
            if adapters is None:
                continue
            for chunk in model_plan.chunks:
                adapter, slot = chunk.request.adapter, chunk.request.adapter_slot
                if adapter is None:
                    continue
                try:
                    adapters.place(slot, adapter.path, adapter.digest)
                except AdapterError as error:
                    print(f"An adapter is lost, and the requests with it end: {error}", file=sys.stderr)
                    adapters.spoil(slot)

    def _launch_streams(self, accelerator: Accelerator, plan: StepPlan, pending: PendingStep) -> None:
        decodes: list[tuple[int, list[Chunk]]] = []
        prefills: list[tuple[int, list[Chunk]]] = []
        for model_plan in plan.models:
            model, chunks = model_plan.model, _ordered(model_plan.chunks)
            short = [chunk for chunk in chunks if _is_decode(chunk)] if self._graphs else []
            if short:
                decodes.append((model, short))
            if len(short) < len(chunks):
                prefills.append((model, [chunk for chunk in chunks if not _is_decode(chunk)] if short else chunks))
                self._builders[model].reserve(chunks)
        encodes = [encode for model_plan in plan.models for encode in model_plan.encodes]
        if prefills or encodes:
            accelerator.fork()
        for model, chunks in decodes:
            self._draw_free(pending, model, *self._launch_decodes(model, chunks))
        if prefills or encodes:
            with accelerator.beside():
                for encode in encodes:
                    self._encoder.advance(encode)
                for model, chunks in prefills:
                    self._launch_prefills(accelerator, pending, model, chunks)
            accelerator.join()

    def _launch_prefills(
        self, accelerator: Accelerator, pending: PendingStep, model: int, chunks: Sequence[Chunk]
    ) -> None:
        """Run `chunks` and draw; in parts, where memory does not do for all of them at once."""
        num_drawn, num_undrawn = len(pending.ids), len(pending.undrawn)
        try:
            self._draw_free(pending, model, *self._run(model, chunks))
            return
        except torch.OutOfMemoryError:
            if len(chunks) == 1 and (chunks[0].num_tokens == 1 or _is_decode(chunks[0])):
                raise
        # Not in the handler: as long as that runs, its traceback holds what the attempt has allocated.
        num_handles = sum([len(ids) for ids in pending.ids[:num_drawn]])
        del pending.ids[num_drawn:], pending.logprobs[num_drawn:], pending.handles[num_handles:]
        del pending.undrawn[num_undrawn:]
        accelerator.reclaim()
        for half in _halves(chunks):
            self._launch_prefills(accelerator, pending, model, half)

    @torch.inference_mode()
    def draw(self, pending: PendingStep) -> None:
        """Draw what waits for masks; every id before has been committed."""
        if not pending.undrawn:
            return
        for undrawn in pending.undrawn:
            self._draw(pending, undrawn.model, undrawn.logits, undrawn.draws, self._bitmask(pending, undrawn))
        pending.undrawn = []
        self._send(pending)

    def collect(self, pending: PendingStep) -> StepResult:
        """Wait for a step's ids. Steps are collected in the order of their launches."""
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

    def _launch_decodes(self, model: int, chunks: list[Chunk]) -> tuple[Tensor, Draws]:
        """The logits [rows, vocabulary] of decodes, a row for each token, by a graph."""
        assert self._accelerator is not None
        graphs = self._graphs[model]
        adapted = any(chunk.request.adapter_slot >= 0 for chunk in chunks)
        num_rows = sum([chunk.num_tokens for chunk in chunks])
        bucket = graphs.bucket(num_rows, adapted)
        staging = self._accelerator.staging(graphs.inputs.staged_bytes(bucket))
        draws = self._builders[model].stage_decodes(chunks, bucket, graphs.inputs, staging)
        graphs.inputs.refresh(staging)
        graphs.launch(bucket, adapted)
        return graphs.logits[:num_rows], draws

    def _run(self, model: int, chunks: Sequence[Chunk]) -> tuple[Tensor | None, Draws]:
        """The logits of the chunks that sample, None where none does."""
        decoder = self._models[model].decoder
        batch, draws = self._builders[model].build(chunks)
        programs = self._programs[model] if self._programs else None
        if programs is not None and programs.fits(batch):
            return programs.logits(batch), draws
        hidden = decoder.forward(batch, self._kv_caches[model])
        return (decoder.logits(hidden) if draws.requests else None), draws

    def _draw_free(self, pending: PendingStep, model: int, logits: Tensor | None, draws: Draws) -> None:
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
        if self._graphs:
            self._graphs[model].inputs.tokens.index_copy_(0, draws.token_slots, drawn)
        if self.keep_logits:
            self.last_logits |= dict(
                zip(handles, logits.clone() if self._graphs or self._programs else logits, strict=True)
            )

    def _send(self, pending: PendingStep) -> None:
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

    @torch.inference_mode()
    def _make_graphs(self, accelerator: Accelerator) -> list[DecodeGraphs]:
        num_rows, device = self._most_rows, accelerator.device
        largest = max(model.config.vocab_size for model in self._models)
        logits = torch.empty(num_rows * largest, dtype=torch.float32, device=device)  # one for all: used up at once
        graphs = []
        for model, kv_caches, tokens_per_page, adapters in zip(
            self._models, self._kv_caches, self.tokens_per_page, self._adapters, strict=True
        ):
            inputs = DecodeInputs(
                num_rows=num_rows,
                num_slots=self.max_num_running,
                pages_per_row=-(-model.context_window // tokens_per_page),
                device=device,
            )
            vocabulary = model.config.vocab_size
            rows = logits[: num_rows * vocabulary].view(num_rows, vocabulary)
            graphs.append(DecodeGraphs(accelerator, model.decoder, kv_caches, inputs, rows, adapters))
        return graphs

    def _make_programs(self) -> list[StepPrograms | None]:
        """What graphs are on a card, for the models whose operations can be recorded."""
        if self.memory.bytes.device.type != "cpu":
            return []
        from aiexport_edge.engine.models.decode_programs import can_record
        from aiexport_edge.engine.models.step_programs import StepPrograms

        programs: list[StepPrograms | None] = []
        for model, kv_caches, tokens_per_page in zip(self._models, self._kv_caches, self.tokens_per_page, strict=True):
            pages_per_row = -(-model.context_window // tokens_per_page)
            programs.append(
                StepPrograms(
                    model.decoder,
                    kv_caches,
                    num_tokens=self.max_step_tokens,
                    num_rows=self._most_rows,
                    pages_per_row=pages_per_row,
                    dtype=model.dtype,
                )
                if can_record(model.decoder)
                else None
            )
        return programs

    def warm_up(self, progress: Progress = untold) -> None:
        """Run every operation of every model once, in page 0, so that nothing is compiled while serving."""
        warm_up(self, self._graphs, progress)
        if self._accelerator is not None:
            self._accelerator.reserve_staging()

    def run_largest_steps(self) -> None:
        """The steps that take the most memory, in page 0, beside the largest picture half done."""
        looking = max(range(self.num_models), key=self._largest_picture)
        held = hold_largest_picture(self, dummy_request(self, looking, 1))
        if held is not None:
            self.step(held)
        for chunks in largest_steps(self):
            self.step(StepPlan([ModelPlan(chunks[0].request.model, chunks)]))
        if held is not None:
            self.step(StepPlan([], [held.models[0].encodes[0].key]))

    def _largest_picture(self, model: int) -> int:
        """Elements of the largest picture in the model's tower."""
        eyes = self.eyes[model]
        return 0 if eyes is None else eyes.largest_patches * eyes.config.hidden_size


def _pace(config: CoreConfig, models: Sequence[LoadedModel], device: torch.device) -> PrefillPace:
    """On a card, what a full step of short prompts costs. On a processor a decode takes a tenth of that, and does not
    run beside it: a quarter."""
    most = config.max_step_tokens
    return PrefillPace(
        beside_decodes=most / 4 if device.type == "cpu" else most,
        alone=2 * most,
        spans=tuple(attention_span(model.config) for model in models),
    )


def _draft_cost(models: Sequence[LoadedModel], device: torch.device, most_rows: int) -> DraftCost:
    """A decode reads every weight once, and computes with each once a row: on a processor reading takes as long as a
    dozen rows or so, on a card as a hundred."""
    base = 12.0 if device.type == "cpu" else 100.0
    return DraftCost(base, tuple(attention_span(model.config) for model in models), most_rows)


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


def _is_decode(chunk: Chunk) -> bool:
    if not chunk.samples or chunk.num_tokens != 1 + len(chunk.draft):
        return False
    return chunk.request.positions is None or chunk.start >= chunk.request.num_prompt_tokens  # a picture's, or may be


def _ordered(chunks: list[Chunk]) -> list[Chunk]:
    """Those whose draws wait for a mask last."""
    return sorted(chunks, key=_is_constrained) if any(map(_is_constrained, chunks)) else chunks


def _halves(chunks: Sequence[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """The same work in two parts, the second after the first."""
    if len(chunks) > 1:
        middle = len(chunks) // 2
        return list(chunks[:middle]), list(chunks[middle:])
    (chunk,) = chunks
    assert not chunk.draft, "a few rows"
    middle = chunk.num_tokens // 2
    return (
        [Chunk(chunk.request, chunk.start, middle, samples=False)],
        [Chunk(chunk.request, chunk.start + middle, chunk.num_tokens - middle, chunk.samples)],
    )


def _is_constrained(chunk: Chunk) -> bool:
    return chunk.samples and chunk.request.constraint is not None
