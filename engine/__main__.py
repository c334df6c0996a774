"""The engine process: `python -m aiexport_edge.engine [--config FILE] [--state DIR] [--listen ADDR] [--ready-fd N]`.

Owns the order of the first second: the core, whose start takes longest, is spawned before anything else is imported.
Exit status: 0 after draining, 1 with a sentence on stderr.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aiexport_edge.proto import grpc_polling
from aiexport_edge.proto.lifetime import die_with_parent

if TYPE_CHECKING:
    from aiexport_edge.engine.backends.spawn import Spawned
    from aiexport_edge.engine.models.facts import ModelFacts, Vision
    from aiexport_edge.engine.models.vision_config import VisionConfig
    from aiexport_edge.engine.server.process import ImageConfig
    from aiexport_edge.proto.config import Config, WeightsSpec
    from aiexport_edge.proto.config_images import ImagesConfig


def main(argv: list[str] | None = None) -> int:
    """Runs the process; the exit status."""
    die_with_parent()
    grpc_polling.settle()
    gc.disable()  # until all is imported: collections would walk over it again and again
    parser = argparse.ArgumentParser(prog="python -m aiexport_edge.engine", description="The gRPC engine.")
    parser.add_argument("--config", type=Path, help="configuration file (default ./aiexport-edge.toml if it is there)")
    parser.add_argument("--state", type=Path, help="state directory (default: the user's data directory)")
    parser.add_argument("--listen", help="HOST:PORT or unix:PATH (default: engine.listen of the configuration)")
    parser.add_argument("--ready-fd", type=int, help="a descriptor that gets one line when the first model serves")
    arguments = parser.parse_args(argv)
    sys.setswitchinterval(0.0005)  # threads compile grammars, tokenize: the event loop waits a tenth of the usual 5 ms

    from aiexport_edge.engine.backends.spawn import spawn

    try:
        core = spawn()
    except OSError as error:
        return _fail(f"the core process cannot be started ({error}).")

    from aiexport_edge.engine.models.config import ModelError
    from aiexport_edge.proto.config import ConfigError, load

    try:
        config = load(arguments.config, arguments.state)
        facts = _facts(config)
    except (ConfigError, ModelError) as error:
        core.end()
        return _fail(str(error))
    return _run(config, facts, core, arguments.listen or config.engine.listen, arguments.ready_fd)


def _run(config: Config, facts: list[ModelFacts], begun: Spawned, address: str, ready_fd: int | None) -> int:
    """Configures the core, imports the rest, serves."""
    from aiexport_edge.engine.backends.core_process import CoreProcess
    from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel
    from aiexport_edge.engine.models.window import yarn_of

    core_config = CoreConfig(
        models=[
            CoreModel(
                name=fact.name,
                path=str(fact.directory),
                dtype=weights.dtype,
                context_window=fact.context_window,
                deterministic=fact.deterministic,
                revision=fact.revision,
                quantize=weights.quantize,
                kv_cache_dtype=weights.kv_cache_dtype,
                yarn_factor=0.0 if yarn is None else yarn.factor,
                yarn_original=0 if yarn is None else yarn.original,
            )
            for fact, weights, yarn in zip(facts, config.weights, map(yarn_of, config.weights), strict=True)
            if weights.vllm is None
        ],
        device=config.engine.device,
        page_bytes=config.engine.page_bytes,
        pool_bytes=config.engine.pool_bytes,
        max_num_running=config.engine.max_num_running,
        max_step_tokens=config.engine.max_step_tokens,
        num_threads=config.engine.num_threads,
        batch_floor_share=config.engine.batch_floor_share,
        memory_share=config.engine.memory_share,
        kernel_cache=str(config.kernel_cache),
        max_image_tokens=config.images.max_tokens,
        drafts=config.engine.drafts,
        adapter_slots=config.adapters.card_slots,
        max_adapter_rank=config.adapters.max_rank,
        adapter_host_bytes=config.adapters.host_bytes,
    )
    core = None
    if core_config.models:
        core = CoreProcess(begun=begun)
        core.configure(core_config)
    else:
        begun.end()

    import uvloop

    from aiexport_edge.engine.backends.choice import make_backend
    from aiexport_edge.engine.server import logs
    from aiexport_edge.engine.server.listener import ListenerConfig, ListenerError
    from aiexport_edge.engine.server.process import ServerConfig, serve
    from aiexport_edge.engine.server.progress import StartProgress
    from aiexport_edge.proto.tracing import TracingError

    gc.freeze()
    gc.enable()
    logs.set_up(config.telemetry.log_level, config.telemetry.log_format)
    engine = config.engine
    server = ServerConfig(
        listener=ListenerConfig(address, engine.tls_cert, engine.tls_key, engine.token_file, engine.client_ca),
        models=facts,
        queue_size=engine.queue_size,
        tenant_queue_share=engine.tenant_queue_share,
        drain_s=engine.drain.total_seconds(),
        ready_fd=ready_fd,
        otlp_endpoint=config.telemetry.otlp_endpoint,
        images=_images(config.images),
        adapter_roots=config.adapter_roots,
    )
    try:
        progress = StartProgress([fact.name for fact in facts])
        backend = make_backend(config, facts, core_config, core, progress)
        uvloop.run(serve(server, backend))
    except (ListenerError, TracingError) as error:
        return _fail(str(error))
    return 0


def _images(images: ImagesConfig) -> ImageConfig:
    from aiexport_edge.engine.images.limits import ImageLimits
    from aiexport_edge.engine.server.process import ImageConfig

    return ImageConfig(
        limits=ImageLimits(max_bytes=images.max_bytes, max_pixels=images.max_pixels),
        max_count=images.max_count,
        held_bytes=images.held_bytes,
        num_workers=images.workers or max(1, (os.cpu_count() or 1) // 4),
        timeout_s=images.decode_timeout.total_seconds(),
    )


def _facts(config: Config) -> list[ModelFacts]:
    """What the directories say. Raises `ModelError` and `ConfigError`."""
    from aiexport_edge.engine.backends.vllm.shape import load_shape
    from aiexport_edge.engine.models.config import ModelConfig
    from aiexport_edge.engine.models.facts import ModelFacts
    from aiexport_edge.engine.models.revision import model_revision
    from aiexport_edge.engine.models.window import served_window, yarn_of
    from aiexport_edge.proto.config import check_sources, source_directory

    check_sources(config)
    facts = []
    for weights in config.weights:
        directory = source_directory(weights.source)
        yarn = yarn_of(weights)
        model = ModelConfig.load(directory, yarn=yarn) if weights.vllm is None else load_shape(directory)
        window = served_window(config, weights, model)
        limits = [spec.max_output_tokens or min(8192, window) for spec in config.models if spec.weights == weights.name]
        facts.append(
            ModelFacts(
                name=weights.name,
                directory=directory,
                revision=model_revision(
                    directory, quantize=_rounding(weights), kv_cache_dtype=weights.kv_cache_dtype, yarn=yarn
                ),
                vocab_size=model.vocab_size,
                context_window=window,
                max_output_tokens=min(max(limits), window),
                deterministic=weights.deterministic,
                stop_ids=model.stop_ids,
                vision=None if model.vision is None else _vision(directory, model.vision, config.images.max_tokens),
            )
        )
    return facts


def _rounding(weights: WeightsSpec) -> str:
    """What the weights are rounded to when they are loaded, in the backend's own words."""
    return weights.quantize if weights.vllm is None else weights.vllm.quantization or "none"


def _vision(directory: Path, vision: VisionConfig, max_tokens: int) -> Vision:
    """How the model's pictures are to be made. Raises `ModelError` where the files disagree."""
    from aiexport_edge.engine.images.preprocessor import load_patch_config
    from aiexport_edge.engine.models.facts import Vision

    return Vision(load_patch_config(directory, vision).with_at_most(max_tokens), vision.image_token_id)


def _fail(sentence: str) -> int:
    print(f"aiexport-edge engine: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
