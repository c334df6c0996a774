"""Brings a core's models onto its device: weights, the pool beside them, a warm runner over both.

Owns the order of a start and what of the memory becomes pages. Knows no plans and no requests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import msgspec
import torch

from aiexport_edge.engine.adapters.peft import MAX_RANK
from aiexport_edge.engine.core.accelerator import Accelerator, CudaAccelerator
from aiexport_edge.engine.core.device import keep_kernels, select_device
from aiexport_edge.engine.core.encoder import encoding_bytes, eyes_of, picture_bytes
from aiexport_edge.engine.core.kv_memory import (
    KVMemory,
    ModelNeed,
    PoolShape,
    available_memory,
    device_pool_bytes,
    pool_shape,
    smallest_shape,
)
from aiexport_edge.engine.core.protocol import CoreConfig
from aiexport_edge.engine.core.runner import Runner, untold
from aiexport_edge.engine.core.warm_up import Progress
from aiexport_edge.engine.models.adapter_tables import ModelAdapters
from aiexport_edge.engine.models.config import ModelError, Yarn
from aiexport_edge.engine.models.loader import LoadedModel, load_model
from aiexport_edge.kernels.threads import set_num_threads

STEP_TOKENS_CPU, STEP_TOKENS_CARD = 512, 2048  # a card's products are busy from about a thousand rows on

CPU_SLOTS, CARD_RANK = 8, 64  # places for adapters, and their rank, where nobody says


def load(
    config: CoreConfig,
    progress: Callable[[int, int, int], None] | None = None,
    warming: Progress = untold,
    *,
    keep_logits: bool = False,
) -> Runner:
    """Load every model of `config`, lay out the pool and warm up. `progress` is told (model, bytes done, bytes in all)
    while weights are read, `warming` (parts done, parts in all) after that.

    Raises ModelError with a sentence for the operator.
    """
    device = select_device(config.device)
    if not config.max_step_tokens:
        chosen = STEP_TOKENS_CPU if device.type == "cpu" else STEP_TOKENS_CARD
        config = msgspec.structs.replace(config, max_step_tokens=chosen)
    set_num_threads(config.num_threads or torch.get_num_threads())
    accelerator = None
    if device.type != "cpu":
        keep_kernels(config.kernel_cache)
        accelerator = CudaAccelerator(device)
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
                    kv_cache_dtype=model.kv_cache_dtype,
                    context_window=model.context_window,
                    deterministic=model.deterministic,
                    yarn=Yarn(model.yarn_factor, model.yarn_original) if model.yarn_factor else None,
                    device=device,
                    progress=report,
                )
            )
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"the weights of model {model.name} do not fit into the memory of {device}; serve fewer or smaller "
                "models on it, or free what other programs hold there"
            ) from error
    for loaded in models:
        if loaded.note:
            print(f"model {loaded.name}: {loaded.note}", file=sys.stderr)
    return make_runner(config, models, device, accelerator, keep_logits=keep_logits, progress=warming)


def make_runner(
    config: CoreConfig,
    models: Sequence[LoadedModel],
    device: torch.device,
    accelerator: Accelerator | None,
    *,
    keep_logits: bool = False,
    progress: Progress = untold,
) -> Runner:
    """A warm runner of models that lie on `device`, over a pool that takes what memory is left. `progress` is told of
    the warm-up: parts done, parts in all.

    Raises ModelError with a sentence for the operator.
    """
    adapters = [_adapters_of(config, model, device, is_card=accelerator is not None) for model in models]
    needs = [
        ModelNeed(model.name, model.config.kv_bytes_per_token(model.kv_dtype.itemsize), model.context_window)
        for model in models
    ]

    eyes = [eyes_of(model, config.max_image_tokens) for model in models]
    for_pictures = picture_bytes(eyes)

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
        Runner(config, models, memory, accelerator=accelerator, adapters=adapters).run_largest_steps()

    if accelerator is None:
        shape = shape_of(config.pool_bytes, max(0, available_memory() - for_pictures - encoding_bytes(models, eyes)))
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
            free_bytes=accelerator.free_bytes() - for_pictures,
            peak_bytes=peak_bytes,
            device=str(device),
        )
        shape = shape_of(pool_bytes)
    try:
        runner = Runner(
            config,
            models,
            KVMemory(shape, device),
            keep_logits=keep_logits,
            accelerator=accelerator,
            adapters=adapters,
        )
        runner.warm_up(progress)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the memory of {device} does not do for a page pool of {shape.num_pages * shape.page_bytes} bytes, graphs "
            "and activations; lower engine.pool_bytes, engine.max_step_tokens or engine.max_num_running"
        ) from error
    return runner


def _adapters_of(
    config: CoreConfig, model: LoadedModel, device: torch.device, *, is_card: bool
) -> ModelAdapters | None:
    """Empty places for the model's adapters. Raises ModelError where there is no memory for them."""
    if is_card and not config.adapter_slots:
        return None
    num_slots = config.adapter_slots or CPU_SLOTS
    max_rank = config.max_adapter_rank or (CARD_RANK if is_card else MAX_RANK)
    try:
        return ModelAdapters(
            model.config,
            num_slots=num_slots,
            max_rank=max_rank,
            host_bytes=config.adapter_host_bytes,
            dtype=model.dtype,
            device=device,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{num_slots} adapters of rank {max_rank} for model {model.name} do not fit into "
            f"the memory of {device} beside the weights; lower adapters.slots or adapters.max_rank"
        ) from error
