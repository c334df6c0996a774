"""From the configuration to the engine's backend: the native one, one of vLLM for each model that asks for it, or both.

Owns that choice and what each is told; imports no vllm.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiexport_edge.engine.backends.base import Backend, StartListener
from aiexport_edge.engine.backends.composite import CompositeBackend, Part, PartProgress
from aiexport_edge.engine.backends.core_process import CoreProcess
from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel
from aiexport_edge.engine.models.facts import ModelFacts
from aiexport_edge.proto.config import Config, WeightsSpec
from aiexport_edge.proto.config_vllm import VllmConfig


def native_models(config: Config) -> list[int]:
    """Which of `config.weights` the native backend has."""
    return [index for index, weights in enumerate(config.weights) if weights.vllm is None]


def make_backend(
    config: Config,
    facts: Sequence[ModelFacts],
    core_config: CoreConfig,
    core: CoreProcess | None,
    progress: StartListener,
) -> Backend:
    """`facts` of all models in order; `core_config` has the native ones. `core` is one that is already configured by
    it, None where there are none.
    """
    step_timeout_s = config.engine.step_timeout.total_seconds()
    parts: list[Part] = []
    own = native_models(config)
    if own:
        native = NativeBackend(
            core_config, first=core, step_timeout_s=step_timeout_s, progress=PartProgress(progress, own)
        )
        parts.append(Part(native, own))
    for index, (weights, fact) in enumerate(zip(config.weights, facts, strict=True)):
        if weights.vllm is not None:
            parts.append(Part(_vllm(config, weights, weights.vllm, fact, PartProgress(progress, [index])), [index]))
    return parts[0].backend if len(parts) == 1 else CompositeBackend(parts)


def _vllm(
    config: Config, weights: WeightsSpec, options: VllmConfig, fact: ModelFacts, progress: StartListener
) -> Backend:
    from aiexport_edge.engine.backends.vllm.launch import VllmBackend
    from aiexport_edge.engine.backends.vllm.protocol import WorkerConfig

    engine = config.engine
    model = CoreModel(
        name=fact.name,
        path=str(fact.directory),
        dtype=weights.dtype,
        context_window=fact.context_window,
        deterministic=False,
        revision=fact.revision,
    )
    return VllmBackend(
        WorkerConfig(
            model=model,
            tensor_parallel=options.tensor_parallel,
            pipeline_parallel=options.pipeline_parallel,
            data_parallel=options.data_parallel,
            distributed=options.distributed,
            memory_share=options.memory_share,
            kv_cache_bytes=options.kv_cache_bytes,
            quantization=options.quantization,
            eager=options.eager,
            attention=options.attention,
            max_num_running=engine.max_num_running,
            max_step_tokens=engine.max_step_tokens,
            batch_floor_share=engine.batch_floor_share,
            adapter_slots=config.adapters.card_slots,
            max_adapter_rank=config.adapters.card_rank,
            max_pictures=config.images.max_count if fact.vision is not None else 0,
        ),
        python=options.python,
        gpus=options.gpus,
        num_threads=engine.num_threads,
        step_timeout_s=engine.step_timeout.total_seconds(),
        progress=progress,
    )
