"""vLLM's async engine behind the worker's interface: how it is made, asked and heard.

With `pictures.py` the only module through which a worker imports vllm; the engine process never does. Knows no frames
and no parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import DecoderOnlyEngineInput, tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from aiexport_edge.engine.backends.vllm.pictures import PatchShape, picture_input
from aiexport_edge.engine.backends.vllm.protocol import WorkerConfig
from aiexport_edge.engine.backends.vllm.sampling import FIRST_INDEX_ARG, REQUEST_ARG
from aiexport_edge.engine.backends.vllm.worker import EngineDead, EngineLoad, Piece, RequestFailed
from aiexport_edge.engine.core.protocol import (
    HEADER,
    AdapterRef,
    AddRequest,
    AddVocabulary,
    ToCore,
    encode_to_core,
    pack_ids,
)
from aiexport_edge.engine.core.request import Request

SUPPORTED = "0.32"
PROCESSOR = "aiexport_edge.engine.backends.vllm.sampling:Sampler"
EXTENSION = "aiexport_edge.engine.backends.vllm.sampling.Announcements"
LORA_RANKS = (8, 16, 32, 64, 128, 256)  # those that vLLM is made for
CPU_KV_CACHE_BYTES = 1 << 30  # where nothing is said
CPU_BLOCK_TOKENS = 32  # vLLM's own choice, 128, finds no prefix shorter than that


def engine_args(config: WorkerConfig) -> dict[str, Any]:
    """What `AsyncEngineArgs` is made of. `dtype` "auto" is vLLM's own rule: the checkpoint's, 16-bit for float32."""
    model = config.model
    on_processor = vllm.platforms.current_platform.is_cpu()
    arguments: dict[str, Any] = {
        "model": model.path,
        "served_model_name": model.name,
        "dtype": model.dtype,
        "max_model_len": model.context_window,
        "max_num_seqs": config.max_num_running,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        "data_parallel_size": config.data_parallel,
        "gpu_memory_utilization": config.memory_share,
        "enforce_eager": on_processor if config.eager is None else config.eager,
        "enable_prefix_caching": True,
        "scheduling_policy": "priority",
        "logits_processors": [PROCESSOR],
        "worker_extension_cls": EXTENSION,
        "generation_config": "vllm",  # what a request does not say is not looked for in the model's directory
        "load_format": "safetensors",
        "disable_log_stats": True,
    }
    if config.max_pictures:
        arguments["limit_mm_per_prompt"] = {"image": config.max_pictures, "video": 0}
        arguments["mm_processor_cache_gb"] = 0  # pictures come as they are to be seen
        arguments["mm_device_do_normalize"] = True
        arguments["skip_mm_profiling"] = on_processor  # its memory is not shared out by measuring
    else:
        arguments["skip_tokenizer_init"] = True  # text is the engine process's; eyes want it
        if "vision_config" in json.loads((Path(model.path) / "config.json").read_bytes()):
            arguments["language_model_only"] = True  # pictures are refused before they come here
    if config.distributed != "auto":
        arguments["distributed_executor_backend"] = config.distributed
        if config.data_parallel > 1:
            arguments["data_parallel_backend"] = config.distributed
    if config.max_step_tokens:
        arguments["max_num_batched_tokens"] = config.max_step_tokens
    if config.quantization:
        arguments["quantization"] = config.quantization
    if config.kv_cache_bytes or on_processor:
        arguments["kv_cache_memory_bytes"] = config.kv_cache_bytes or CPU_KV_CACHE_BYTES
    if on_processor:
        arguments["block_size"] = CPU_BLOCK_TOKENS
    if config.adapter_slots:
        arguments["enable_lora"] = True
        arguments["max_loras"] = config.adapter_slots
        arguments["max_lora_rank"] = next(rank for rank in LORA_RANKS if rank >= config.max_adapter_rank)
    if config.attention == "aiexport-edge" and not on_processor:
        arguments["attention_config"] = {"backend": "CUSTOM"}
    return arguments


class VllmEngine:
    """See `worker.AsyncEngine`. Made outside an event loop; raises whatever vLLM raises when it cannot start.

    `heard` is called on the event loop whenever vLLM has told of a step.
    """

    def __init__(self, config: WorkerConfig, heard: Callable[[], None]) -> None:
        self._steps = self._preemptions = 0
        self._usage: dict[int, float] = {}  # of each data-parallel copy, the share of its pages in use
        self._heard = heard
        self._num_generations = 0
        self._adapter_ids: dict[bytes, int] = {}  # vLLM's numbers, by digest
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_args(config)), stat_loggers=[self._stat_logger])
        settings = self._llm.vllm_config
        self._num_pages = settings.cache_config.num_gpu_blocks or 0
        self.tokens_per_page: int = settings.cache_config.block_size
        self._page_bytes = self.tokens_per_page * _kv_bytes_per_token(settings)
        # A request lives in one copy.
        self.capacity_tokens = self._num_pages // config.data_parallel * self.tokens_per_page
        self._patches = PatchShape.of(settings.model_config.hf_config.vision_config) if config.max_pictures else None

    async def generate(self, request: Request, message: AddRequest) -> AsyncGenerator[Piece, None]:
        self._num_generations += 1
        first_index = request.num_output_tokens
        # What the processor needs of it; the prompt it has not.
        asked = msgspec.structs.replace(
            message, prompt_ids=b"", output_ids=pack_ids(request.token_ids[request.num_prompt_tokens :]), images=[]
        )
        params = SamplingParams(
            temperature=0.0,  # the processor draws
            max_tokens=request.max_tokens - first_index,
            stop_token_ids=list(message.stop_ids),
            ignore_eos=True,  # it is among the stop ids, or not wanted
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={REQUEST_ARG: _body([asked]), FIRST_INDEX_ARG: first_index},
        )
        prompt: DecoderOnlyEngineInput = tokens_input(list(request.token_ids), cache_salt=message.salt.hex() or None)
        if message.images:
            assert self._patches is not None, "a picture for a model that sees none"
            prompt = await asyncio.to_thread(
                picture_input, prompt["prompt_token_ids"], message.images, self._patches, message.salt
            )
        outputs = self._llm.generate(
            prompt,
            params,
            f"{request.handle}-{self._num_generations}",
            lora_request=self._lora_request(message.adapter),
            priority=message.priority,
        )
        try:
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    (completion,) = output.outputs
                    if output.finished:
                        await anext(outputs, None)  # it has let go of the request: nothing is left to be aborted
                    if completion.finish_reason in ("error", "abort"):
                        raise RequestFailed(f"vLLM has ended it: {completion.finish_reason}")
                    cut = completion.finish_reason == "length"
                    yield Piece(list(completion.token_ids), output.num_cached_tokens or 0, cut=cut)
        except EngineDeadError:
            raise EngineDead(by_kill=self._was_killed()) from None
        except (EngineGenerateError, ValueError) as error:
            raise RequestFailed(str(error.__cause__ or error)) from error

    def _lora_request(self, adapter: AdapterRef | None) -> LoRARequest | None:
        """vLLM reads the directory when it first comes upon the number, and keeps its pages apart by it."""
        if adapter is None:
            return None
        number = self._adapter_ids.setdefault(adapter.digest, len(self._adapter_ids) + 1)
        return LoRARequest(adapter.digest.hex(), number, adapter.path)

    async def learn(self, words: AddVocabulary) -> None:
        await self._tell("learn", words)

    async def announce(self, message: AddRequest) -> None:
        await self._tell("announce", msgspec.structs.replace(message, prompt_ids=b"", images=[]))

    def load(self) -> EngineLoad:
        copies = max(1, len(self._usage))
        used = round(sum(self._usage.values()) * self._num_pages / copies)
        return EngineLoad(self._steps, self._preemptions, self._num_pages, used, self._page_bytes)

    async def _tell(self, method: str, message: ToCore) -> None:
        try:
            await self._llm.collective_rpc(method, args=(_body([message]),))
        except EngineDeadError:
            raise EngineDead(by_kill=self._was_killed()) from None

    def _was_killed(self) -> bool:
        manager = self._llm.engine_core.resources.engine_manager
        return any(process.exitcode == -signal.SIGKILL for process in getattr(manager, "processes", ()))

    def _stat_logger(self, _config: Any, engine_index: int = 0) -> StatLoggerBase:
        return _StatLogger(self._on_stats, engine_index)

    def _on_stats(self, engine_index: int, usage: float, num_preempted: int) -> None:
        self._steps += 1
        self._preemptions += num_preempted
        self._usage[engine_index] = usage
        self._heard()


class _StatLogger(StatLoggerBase):
    """vLLM's way to tell of its steps."""

    def __init__(self, on_stats: Callable[[int, float, int], None], engine_index: int) -> None:
        self._on_stats = on_stats
        self._engine_index = engine_index

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            num_preempted = 0 if iteration_stats is None else iteration_stats.num_preempted_reqs
            self._on_stats(engine_idx, scheduler_stats.kv_cache_usage, num_preempted)

    def log_engine_initialized(self) -> None:
        """Nobody asks."""


def _kv_bytes_per_token(settings: Any) -> int:
    """Of all parts of the model together; of models whose layers are not all alike, an upper bound."""
    model, parallel, dtype = settings.model_config, settings.parallel_config, settings.model_config.dtype
    layers = model.get_num_layers(parallel) * parallel.pipeline_parallel_size
    heads = model.get_num_kv_heads(parallel) * parallel.tensor_parallel_size
    return int(2 * layers * heads * model.get_head_size() * dtype.itemsize)


def _body(messages: list[ToCore]) -> bytes:
    return encode_to_core(messages)[HEADER.size :]
