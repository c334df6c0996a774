"""Runs step plans on the device: batches, decoders, sampler.

Owns the models' weights and the pool's memory. Decides nothing: what runs, and in which pages, is in the plan. Knows no
text. On a card, a step is launched and its ids are collected later: decodes are graphs, prefills are launched after
them, ids stay in slots on the device for the next step and travel to the host meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import torch
from torch import Tensor

from aiexport_edge.engine.core.accelerator import Accelerator, CudaAccelerator
from aiexport_edge.engine.core.batch import BatchBuilder, Draws
from aiexport_edge.engine.core.decode_graphs import DecodeGraphs, bucket_of
from aiexport_edge.engine.core.decode_inputs import DecodeInputs
from aiexport_edge.engine.core.device import select_device
from aiexport_edge.engine.core.kv_memory import (
    KVMemory,
    ModelNeed,
    PoolShape,
    available_memory,
    device_pool_bytes,
    pool_shape,
    smallest_shape,
)
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan, StepResult
from aiexport_edge.engine.core.protocol import CoreConfig, Priority, Sampling
from aiexport_edge.engine.core.request import Request, Status
from aiexport_edge.engine.models.config import ModelError
from aiexport_edge.engine.models.loader import LoadedModel, load_model
from aiexport_edge.kernels.sampler import sample
from aiexport_edge.kernels.threads import set_num_threads

if TYPE_CHECKING:
    from aiexport_edge.engine.models.decode_programs import DecodePrograms

WARM_UP_TOKENS = 64
STEP_TOKENS_CPU, STEP_TOKENS_CARD = 512, 2048  # a card's products are busy from about a thousand rows on


@dataclass(frozen=True, slots=True)
class _Undrawn:
    """Rows of a launched step whose ids are drawn when the masks of their constraints are known."""

    model: int
    logits: Tensor  # float32 [rows, vocabulary]
    draws: Draws


@dataclass(slots=True)
class PendingStep:
    """A step that has been launched: whose ids will be in `host_ids` (int64), and the log-probabilities with which they
    were drawn in `host_logprobs` (float32), once `wait` has returned.
    """

    handles: list[int]
    ids: list[Tensor]  # on the device, in the order of `handles`
    logprobs: list[Tensor]
    undrawn: list[_Undrawn]
    host_ids: Tensor
    host_logprobs: Tensor
    wait: Callable[[], None]


class Runner:
    """Every model of one core, on one device, over one pool of pages.

    `num_pages` (page 0 included, which is never to be handed out), `page_bytes`, `max_step_tokens`; `tokens_per_page`
    and `weight_bytes` by model; `memory` is what the pages lie in. With `keep_logits`, `last_logits` holds the float32
    logits [vocabulary] that each id of the last step was drawn from, by request handle: for tests. With an
    `accelerator`, decodes are graphs, unless `graphed` is off.
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
    ) -> None:
        self.memory = memory
        self.num_pages = memory.shape.num_pages
        self.page_bytes = memory.shape.page_bytes
        self.tokens_per_page = list(memory.shape.tokens_per_page)
        self.weight_bytes = [model.weight_bytes for model in models]
        self.max_step_tokens = config.max_step_tokens
        self.keep_logits = keep_logits
        self.last_logits: dict[int, Tensor] = {}
        self._models = list(models)
        self._max_num_running = config.max_num_running
        self._kv_caches = [
            memory.layers(
                index,
                num_layers=model.config.num_layers,
                num_kv_heads=model.config.num_kv_heads,
                head_dim=model.config.head_dim,
                dtype=model.dtype,
            )
            for index, model in enumerate(models)
        ]
        self._builders = [
            BatchBuilder(
                tokens_per_page=tokens_per_page,
                context_window=model.context_window,
                max_requests=config.max_num_running,
                device=memory.bytes.device,
                staging=None if accelerator is None else accelerator.staging,
            )
            for model, tokens_per_page in zip(models, self.tokens_per_page, strict=True)
        ]
        self._accelerator = accelerator
        self._graphs = self._make_graphs(accelerator) if accelerator is not None and graphed else []
        self._programs = self._make_programs() if accelerator is None and graphed else []

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
        was launched last.
        """
        self.last_logits = {}
        pending = PendingStep([], [], [], [], _NO_IDS, _NO_LOGPROBS, _nothing)
        several = len(plan.models) > 1
        for model_plan in plan.models:
            model, chunks = model_plan.model, model_plan.chunks
            if any(map(_is_constrained, chunks)):
                chunks = sorted(chunks, key=_is_constrained)
            if self._graphs:
                decodes = [chunk for chunk in chunks if _is_decode(chunk)]
                chunks = [chunk for chunk in chunks if not _is_decode(chunk)] if len(decodes) < len(chunks) else []
                if decodes and chunks:
                    self._builders[model].reserve(model_plan.chunks)
                if decodes:
                    self._draw_free(pending, model, *self._launch_decodes(model, decodes), several)
            if chunks:
                self._draw_free(pending, model, *self._run(model, chunks), several)
        if not pending.undrawn:
            self._send(pending)
        return pending

    @torch.inference_mode()
    def draw(self, pending: PendingStep) -> None:
        """Draw what waits for masks; every id before has been committed."""
        if not pending.undrawn:
            return
        for undrawn in pending.undrawn:
            self._draw(pending, undrawn.model, undrawn.logits, undrawn.draws, self._bitmask(undrawn))
        pending.undrawn = []
        self._send(pending)

    def collect(self, pending: PendingStep) -> StepResult:
        """Wait for a step's ids. Steps are collected in the order of their launches."""
        assert not pending.undrawn, "draw comes before collect"
        pending.wait()
        ids = {handle: [id_] for handle, id_ in zip(pending.handles, pending.host_ids.tolist(), strict=True)}
        broken = np.isnan(pending.host_logprobs.numpy())  # the sampler's word for a row without a distribution
        if not broken.any():
            return StepResult(ids)
        return StepResult(ids, frozenset(pending.handles[row] for row in np.flatnonzero(broken)))

    def _launch_decodes(self, model: int, chunks: list[Chunk]) -> tuple[Tensor, Draws]:
        """The logits [rows, vocabulary] of one token each, by a graph."""
        assert self._accelerator is not None
        graphs = self._graphs[model]
        bucket = bucket_of(graphs.buckets, len(chunks))
        staging = self._accelerator.staging(graphs.inputs.staged_bytes(bucket))
        draws = self._builders[model].stage_decodes(chunks, bucket, graphs.inputs, staging)
        graphs.inputs.refresh(staging)
        graphs.launch(bucket)
        return graphs.logits[: len(chunks)], draws

    def _run(self, model: int, chunks: Sequence[Chunk]) -> tuple[Tensor | None, Draws]:
        """The logits of the chunks that sample, None where none does."""
        decoder = self._models[model].decoder
        batch, draws = self._builders[model].build(chunks)
        programs = self._programs[model] if self._programs else None
        if programs is not None and programs.fits(batch):
            return programs.logits(batch), draws
        hidden = decoder.forward(batch, self._kv_caches[model])
        return (decoder.logits(hidden) if draws.requests else None), draws

    def _draw_free(self, pending: PendingStep, model: int, logits: Tensor | None, draws: Draws, several: bool) -> None:
        """Draw from the rows that have no constraint; the others, which are the last, wait. `several`: other models run
        in this step, and graphs share the memory of their logits."""
        if logits is None:
            return
        requests = draws.requests
        if requests[-1].constraint is None:
            self._draw(pending, model, logits, draws)
            return
        num_free = sum([request.constraint is None for request in requests])
        if num_free:
            self._draw(pending, model, logits[:num_free], draws[:num_free])
        waiting = logits[num_free:]
        pending.undrawn.append(_Undrawn(model, waiting.clone() if several else waiting, draws[num_free:]))

    def _bitmask(self, undrawn: _Undrawn) -> Tensor:
        """What the constraints allow, int32 [rows, words]; a request that has ended meanwhile is not asked."""
        num_rows, vocabulary = undrawn.logits.shape
        size = 4 * num_rows * -(-vocabulary // 32)
        host = torch.empty(size, dtype=torch.uint8) if self._accelerator is None else self._accelerator.staging(size)
        masks = host.numpy().view(np.int32).reshape(num_rows, -1)
        for mask, request in zip(masks, undrawn.draws.requests, strict=True):
            if request.status is Status.FINISHED:
                mask[:] = -1
            else:
                assert request.constraint is not None
                request.constraint.fill(mask)
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
        num_rows, device = self._max_num_running, accelerator.device
        largest = max(model.config.vocab_size for model in self._models)
        logits = torch.empty(num_rows * largest, dtype=torch.float32, device=device)  # one for all: used up at once
        graphs = []
        for model, kv_caches, tokens_per_page in zip(self._models, self._kv_caches, self.tokens_per_page, strict=True):
            inputs = DecodeInputs(
                num_rows=num_rows,
                num_slots=num_rows,
                pages_per_row=-(-model.context_window // tokens_per_page),
                device=device,
            )
            vocabulary = model.config.vocab_size
            rows = logits[: num_rows * vocabulary].view(num_rows, vocabulary)
            graphs.append(DecodeGraphs(accelerator, model.decoder, kv_caches, inputs, rows))
        return graphs

    def _make_programs(self) -> list[DecodePrograms | None]:
        """What graphs are on a card, for the models whose operations can be recorded."""
        if self.memory.bytes.device.type != "cpu":
            return []
        from aiexport_edge.engine.models.decode_programs import DecodePrograms, can_record

        programs: list[DecodePrograms | None] = []
        for model, kv_caches, tokens_per_page in zip(self._models, self._kv_caches, self.tokens_per_page, strict=True):
            pages_per_row = -(-model.context_window // tokens_per_page)
            programs.append(
                DecodePrograms(
                    model.decoder,
                    kv_caches,
                    num_rows=self._max_num_running,
                    pages_per_row=pages_per_row,
                    dtype=model.dtype,
                )
                if can_record(model.decoder)
                else None
            )
        return programs

    def warm_up(self) -> None:
        """Run every operation of every model once, in page 0, so that nothing is compiled while serving."""
        self._capture_first()
        for index, model in enumerate(self._models):
            num_tokens = min(WARM_UP_TOKENS, self.max_step_tokens, model.context_window - 1)
            request = self._dummy(index, num_tokens)
            for chunk in (
                Chunk(request, start=0, num_tokens=num_tokens, samples=False),
                Chunk(request, start=0, num_tokens=num_tokens, samples=True),
                Chunk(request, start=num_tokens, num_tokens=1, samples=True),
            ):
                self.step(StepPlan([ModelPlan(index, [chunk])]))

    @torch.inference_mode()
    def _capture_first(self) -> None:
        for graphs in self._graphs:
            graphs.capture_first()

    def run_largest_steps(self) -> None:
        """What takes the most memory: for each model a prefill of a whole step, alone and shared by all rows, and the
        largest decode. In page 0."""
        for index, model in enumerate(self._models):
            longest = min(self.max_step_tokens, model.context_window - 1)
            shared = max(1, min(self.max_step_tokens // self._max_num_running, model.context_window - 1))
            rows = [self._dummy(index, shared, row) for row in range(min(self._max_num_running, self.max_step_tokens))]
            for chunks in (
                [Chunk(self._dummy(index, longest), 0, longest, True)],
                [Chunk(request, 0, shared, True) for request in rows],
                [Chunk(request, shared, 1, True) for request in rows],
            ):
                self.step(StepPlan([ModelPlan(index, chunks)]))

    def _dummy(self, model: int, num_tokens: int, row: int = 0) -> Request:
        """A request of `num_tokens` and one more, all in page 0, with every sampling rule in use."""
        return Request(
            handle=-1 - row,
            model=model,
            token_ids=[0] * (num_tokens + 1),
            num_prompt_tokens=num_tokens,
            max_tokens=1,
            stop_ids=frozenset(),
            sampling=Sampling(temperature=1.0, top_p=0.9, top_k=8, seed=0),
            tenant="",
            weight=1.0,
            salt=b"",
            priority=Priority.INTERACTIVE,
            arrival=0,
            pages=[0] * -(-(num_tokens + 1) // self.tokens_per_page[model]),
        )


def load(
    config: CoreConfig, progress: Callable[[int, int, int], None] | None = None, *, keep_logits: bool = False
) -> Runner:
    """Load every model of `config`, lay out the pool and warm up. `progress` is told (model, bytes done, bytes in all).

    Raises ModelError with a sentence for the operator.
    """
    device = select_device(config.device)
    if not config.max_step_tokens:
        chosen = STEP_TOKENS_CPU if device.type == "cpu" else STEP_TOKENS_CARD
        config = msgspec.structs.replace(config, max_step_tokens=chosen)
    set_num_threads(config.num_threads or torch.get_num_threads())
    accelerator = None if device.type == "cpu" else CudaAccelerator(device)
    models = []
    for index, model in enumerate(config.models):

        def report(done: int, total: int, index: int = index) -> None:
            if progress is not None:
                progress(index, done, total)

        try:
            models.append(
                load_model(
                    model.path,
                    name=model.name,
                    dtype=model.dtype,
                    quantize=model.quantize,
                    context_window=model.context_window,
                    deterministic=model.deterministic,
                    device=device,
                    progress=report,
                )
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"the weights of model {model.name} do not fit into the memory of {device}; serve fewer or smaller "
                "models on it, or free what other programs hold there"
            ) from error
    return make_runner(config, models, device, accelerator, keep_logits=keep_logits)


def make_runner(
    config: CoreConfig,
    models: Sequence[LoadedModel],
    device: torch.device,
    accelerator: Accelerator | None,
    *,
    keep_logits: bool = False,
) -> Runner:
    """A warm runner of models that lie on `device`, over a pool that takes what memory is left.

    Raises ModelError with a sentence for the operator.
    """
    needs = [
        ModelNeed(model.name, model.config.kv_bytes_per_token(model.dtype.itemsize), model.context_window)
        for model in models
    ]

    def shape_of(pool_bytes: int, available_bytes: int = 0) -> PoolShape:
        return pool_shape(
            needs,
            page_bytes=config.page_bytes,
            pool_bytes=pool_bytes,
            max_num_running=config.max_num_running,
            available_bytes=available_bytes,
        )

    def run_trial() -> None:
        memory = KVMemory(smallest_shape(needs, page_bytes=config.page_bytes), device)
        Runner(config, models, memory, accelerator=accelerator).run_largest_steps()

    if accelerator is None:
        shape = shape_of(config.pool_bytes, available_memory())
    else:
        try:
            peak_bytes = accelerator.peak_bytes(run_trial)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"a step of {config.max_step_tokens} tokens and {config.max_num_running} requests does not fit into "
                f"the memory of {device} beside the weights; lower engine.max_step_tokens or engine.max_num_running"
            ) from error
        pool_bytes = device_pool_bytes(
            wanted=config.pool_bytes,
            share=config.memory_share,
            free_bytes=accelerator.free_bytes(),
            peak_bytes=peak_bytes,
            device=str(device),
        )
        shape = shape_of(pool_bytes)
    try:
        runner = Runner(config, models, KVMemory(shape, device), keep_logits=keep_logits, accelerator=accelerator)
        runner.warm_up()
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the memory of {device} does not do for a page pool of {shape.num_pages * shape.page_bytes} bytes, graphs "
            "and activations; lower engine.pool_bytes, engine.max_step_tokens or engine.max_num_running"
        ) from error
    return runner


_NO_IDS = torch.empty(0, dtype=torch.int64)
_NO_LOGPROBS = torch.empty(0, dtype=torch.float32)


def _nothing() -> None:
    """There is nothing to wait for."""


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _is_decode(chunk: Chunk) -> bool:
    return chunk.samples and chunk.num_tokens == 1


def _is_constrained(chunk: Chunk) -> bool:
    return chunk.samples and chunk.request.constraint is not None
