"""Decoders with random weights, made on the device: real shapes without a download."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aiexport_edge.engine.core.accelerator import Accelerator, CudaAccelerator
from aiexport_edge.engine.core.loading import make_runner
from aiexport_edge.engine.core.protocol import CoreConfig
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.engine.models.decoder import Decoder, Layer, Mlp
from aiexport_edge.engine.models.loader import LoadedModel
from aiexport_edge.engine.models.rope import cos_sin_table
from aiexport_edge.kernels.linear import PackedLinear
from benchmarks.gpu.report import Bench


def _qwen3(hidden: int, inner: int, layers: int, q_heads: int, kv_heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "eos_token_id": 151645,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, 8, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, 8, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, 8, tied=False),
}
TINY: dict[str, dict[str, Any]] = {
    "tiny": _qwen3(64, 96, 2, 4, 2, tied=True) | {"head_dim": 16, "vocab_size": 300, "max_position_embeddings": 256}
}


def shapes(bench: Bench) -> dict[str, dict[str, Any]]:
    """The configurations to measure."""
    return TINY if bench.dry_run else SHAPES


def random_model(
    values: dict[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    context_window: int,
    deterministic: bool = False,
) -> LoadedModel:
    """A model of this config.json with weights of variance 1 / inputs, as activations like."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(values))
        config = ModelConfig.load(directory)
    num_parameters = 0

    def matrix(rows: int, columns: int) -> Tensor:
        nonlocal num_parameters
        num_parameters += rows * columns
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=1 / math.sqrt(columns))

    def ones(size: int) -> Tensor:
        nonlocal num_parameters
        num_parameters += size
        return torch.ones(size, dtype=dtype, device=device)

    def product(rows: int, columns: int) -> PackedLinear:
        return PackedLinear(matrix(rows, columns), dtype=dtype, deterministic=deterministic)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embedding = matrix(config.vocab_size, hidden)
    layers = [
        Layer(
            input_norm=ones(hidden),
            qkv=product(q_rows + 2 * kv_rows, hidden),
            q_norm=ones(config.head_dim) if config.qk_norm else None,
            k_norm=ones(config.head_dim) if config.qk_norm else None,
            o=product(hidden, q_rows),
            post_attention_norm=ones(hidden),
            mlp=Mlp(product(2 * inner, hidden), product(hidden, inner)),
            sliding_window=0,
        )
        for _ in range(config.num_layers)
    ]
    decoder = Decoder(
        config,
        embedding=embedding,
        layers=layers,
        norm=ones(hidden),
        head=PackedLinear(embedding, dtype=dtype, deterministic=deterministic)
        if config.tie_word_embeddings
        else product(config.vocab_size, hidden),
        cos_sin=cos_sin_table(config.rope, config.head_dim, context_window, device),
        deterministic=deterministic,
    )
    return LoadedModel("random", config, decoder, dtype, context_window, num_parameters * dtype.itemsize)


def runner_of(
    bench: Bench,
    model: LoadedModel,
    *,
    max_num_running: int,
    max_step_tokens: int,
    pool_bytes: int = 0,
    adapter_slots: int = 0,
    max_adapter_rank: int = 0,
    drafts: bool = False,
) -> Runner:
    """A warm runner as the core has it; its pages hold noise, so that no product is of zeros."""
    config = CoreConfig(
        models=[],
        device=str(bench.device),
        page_bytes=0,
        pool_bytes=pool_bytes,
        max_num_running=max_num_running,
        max_step_tokens=max_step_tokens,
        num_threads=0,
        batch_floor_share=0.0,
        adapter_slots=adapter_slots,
        max_adapter_rank=max_adapter_rank,
        adapter_host_bytes=4 << 30,
        drafts=drafts,
    )
    runner = make_runner(config, [model], bench.device, accelerator_for(bench))
    runner.memory.bytes.view(model.dtype).normal_()
    return runner


def has_room(runner: Runner, batch: int, num_tokens: int) -> bool:
    """Whether the pool holds `batch` sequences of so many tokens."""
    return batch * -(-num_tokens // runner.tokens_per_page[0]) < runner.num_pages


def accelerator_for(bench: Bench) -> Accelerator:
    """The card, or what stands for it on a dry run."""
    return CudaAccelerator(bench.device) if bench.device.type == "cuda" else _HostAccelerator()


class _HostAccelerator:
    """A dry run's: what is captured runs again, nothing is awaited, and memory is what the trial says."""

    device = torch.device("cpu")

    def staging(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def reserve_staging(self) -> None:
        pass

    def fork(self) -> None:
        pass

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def join(self) -> None:
        pass

    def reclaim(self) -> None:
        pass

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return run

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def free_bytes(self) -> int:
        return 1 << 30

    def peak_bytes(self, run: Callable[[], None]) -> int:
        run()
        return 0
