"""Runs step plans on the device: batches, decoders, sampler.

Owns the models' weights and the pool's memory, and everything that depends on the device. Decides nothing: what runs,
and in which pages, is in the plan. Knows no text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aiexport_edge.engine.core.batch import BatchBuilder
from aiexport_edge.engine.core.kv_memory import KVMemory, ModelNeed, available_memory, pool_shape
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan, StepResult
from aiexport_edge.engine.core.protocol import CoreConfig, Priority, Sampling
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.models.config import ModelError
from aiexport_edge.engine.models.loader import LoadedModel, load_model
from aiexport_edge.kernels.sampler import sample
from aiexport_edge.kernels.threads import set_num_threads

WARM_UP_TOKENS = 64


class Runner:
    """Every model of one core, on one device, over one pool of pages.

    `num_pages` (page 0 included, which is never to be handed out), `page_bytes`; `tokens_per_page` and `weight_bytes`
    by model; `memory` is what the pages lie in. With `keep_logits`, `last_logits` holds the float32 logits [vocabulary]
    that each id of the last step was drawn from, by request handle: for tests.
    """

    def __init__(
        self, config: CoreConfig, models: Sequence[LoadedModel], memory: KVMemory, *, keep_logits: bool = False
    ) -> None:
        self.memory = memory
        self.num_pages = memory.shape.num_pages
        self.page_bytes = memory.shape.page_bytes
        self.tokens_per_page = list(memory.shape.tokens_per_page)
        self.weight_bytes = [model.weight_bytes for model in models]
        self.keep_logits = keep_logits
        self.last_logits: dict[int, Tensor] = {}
        self._models = list(models)
        self._max_step_tokens = config.max_step_tokens
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
            )
            for model, tokens_per_page in zip(models, self.tokens_per_page, strict=True)
        ]

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Compute every chunk of `plan` and draw an id for each that samples. Blocks until the ids are here."""
        self.last_logits = {}
        ids: dict[int, list[int]] = {}
        for model_plan in plan.models:
            self._run(model_plan, ids)
        return StepResult(ids=ids)

    def _run(self, plan: ModelPlan, ids: dict[int, list[int]]) -> None:
        decoder = self._models[plan.model].decoder
        batch, draws = self._builders[plan.model].build(plan.chunks)
        hidden = decoder.forward(batch, self._kv_caches[plan.model])
        if not draws.handles:
            return
        logits = decoder.logits(hidden)
        drawn, _ = sample(logits, draws.temperature, draws.top_k, draws.top_p, draws.seeds, draws.output_index)
        for handle, token_id in zip(draws.handles, drawn.tolist(), strict=True):
            ids[handle] = [token_id]
        if self.keep_logits:
            self.last_logits |= dict(zip(draws.handles, logits, strict=True))

    def warm_up(self) -> None:
        """Run every operation of every model once, in page 0, so that nothing is compiled while serving."""
        for index, model in enumerate(self._models):
            num_tokens = min(WARM_UP_TOKENS, self._max_step_tokens, model.context_window - 1)
            pages = [0] * -(-(num_tokens + 1) // self.tokens_per_page[index])
            request = Request(
                handle=-1,
                model=index,
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
                pages=pages,
            )
            for chunk in (
                Chunk(request, start=0, num_tokens=num_tokens, samples=False),
                Chunk(request, start=0, num_tokens=num_tokens, samples=True),
                Chunk(request, start=num_tokens, num_tokens=1, samples=True),
            ):
                self.step(StepPlan([ModelPlan(index, [chunk])]))


def load(
    config: CoreConfig, progress: Callable[[int, int, int], None] | None = None, *, keep_logits: bool = False
) -> Runner:
    """Load every model of `config`, lay out the pool and warm up. `progress` is told (model, bytes done, bytes in all).

    Raises ModelError with a sentence for the operator.
    """
    device = _device(config.device)
    set_num_threads(config.num_threads or torch.get_num_threads())
    models = []
    for index, model in enumerate(config.models):

        def report(done: int, total: int, index: int = index) -> None:
            if progress is not None:
                progress(index, done, total)

        models.append(
            load_model(
                model.path,
                name=model.name,
                dtype=model.dtype,
                context_window=model.context_window,
                deterministic=model.deterministic,
                device=device,
                progress=report,
            )
        )
    shape = pool_shape(
        [
            ModelNeed(model.name, model.config.kv_bytes_per_token(model.dtype.itemsize), model.context_window)
            for model in models
        ],
        page_bytes=config.page_bytes,
        pool_bytes=config.pool_bytes,
        max_num_running=config.max_num_running,
        available_bytes=available_memory(),
    )
    runner = Runner(config, models, KVMemory(shape, device), keep_logits=keep_logits)
    runner.warm_up()
    return runner


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu"):
        raise ModelError(f"device {name} is not supported in this version; use auto or cpu")
    return torch.device("cpu")
