"""Runs step plans on the device: batches, decoders, and the sampler behind them.

Owns the models' weights and the pool's memory. Decides nothing: what runs, and in which pages, is in the plan. Knows no
text. What becomes of logits is `step_sampler.py`'s. On a card, a step is launched and its ids are collected later:
decodes are graphs, prefills are launched after them, ids stay in slots on the device for the next step and travel to
the host meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
from aiexport_edge.engine.core.step_sampler import PendingStep, StepSampler
from aiexport_edge.engine.core.warm_up import Progress, dummy_request, largest_steps, warm_up
from aiexport_edge.engine.core.warm_up_pictures import hold_largest_picture
from aiexport_edge.engine.models.adapter_tables import ModelAdapters
from aiexport_edge.engine.models.cost import attention_span
from aiexport_edge.engine.models.loader import LoadedModel

if TYPE_CHECKING:
    from aiexport_edge.engine.models.step_programs import StepPrograms


def untold(done: int, total: int) -> None:
    """Nobody wants to know."""


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
        self.adapter_room = next(
            (AdapterRoom(of_model.num_slots, of_model.max_rank) for of_model in self._adapters if of_model),
            AdapterRoom(),
        )
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
        tokens = [graphs.inputs.tokens for graphs in self._graphs]
        self._sampler = StepSampler(accelerator, tokens, keeps_logits=keep_logits)

    def has_adapters(self, model: int) -> bool:
        """Whether the model has places for adapters."""
        return self._adapters[model] is not None

    @property
    def overlaps(self) -> bool:
        """See `StepRunner`: on a card, ids that have not reached the host are taken from where they were drawn."""
        return bool(self._graphs)

    @property
    def last_logits(self) -> dict[int, Tensor]:
        """See `keep_logits`."""
        return self._sampler.last_logits

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
        self._sampler.last_logits = {}
        self._place_adapters(plan)
        chunks = (chunk for model_plan in plan.models for chunk in model_plan.chunks)
        pending = PendingStep({chunk.request.handle: chunk.draft for chunk in chunks if chunk.draft})
        self._encoder.drop(plan.dropped)
        if self._accelerator is None:
            for model_plan in plan.models:
                for encode in model_plan.encodes:
                    self._encoder.advance(encode)
                if model_plan.chunks:
                    model = model_plan.model
                    self._sampler.draw_free(pending, model, *self._run(model, _ordered(model_plan.chunks)))
        else:
            self._launch_streams(self._accelerator, plan, pending)
        if not pending.undrawn:
            self._sampler.send(pending)
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
            self._sampler.draw_free(pending, model, *self._launch_decodes(model, chunks))
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
        progress = pending.progress()
        try:
            self._sampler.draw_free(pending, model, *self._run(model, chunks))
            return
        except torch.OutOfMemoryError:
            if len(chunks) == 1 and (chunks[0].num_tokens == 1 or _is_decode(chunks[0])):
                raise
        # Not in the handler: as long as that runs, its traceback holds what the attempt has allocated.
        pending.take_back(progress)
        accelerator.reclaim()
        for half in _halves(chunks):
            self._launch_prefills(accelerator, pending, model, half)

    @torch.inference_mode()
    def draw(self, pending: PendingStep) -> None:
        """Draw what waits for masks; every id before has been committed."""
        if pending.undrawn:
            self._sampler.draw_constrained(pending)
            self._sampler.send(pending)

    def collect(self, pending: PendingStep) -> StepResult:
        """Wait for a step's ids. Steps are collected in the order of their launches."""
        return self._sampler.collect(pending)

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
