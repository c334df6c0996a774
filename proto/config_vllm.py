"""`backend` of a `[[models]]` entry, and `[models.vllm]` below it: how vLLM serves that model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table

NATIVE, VLLM = "native", "vllm"
BACKENDS = (NATIVE, VLLM)
DISTRIBUTED = ("auto", "mp", "ray")
ATTENTION = ("auto", "aiexport-edge")


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """`[models.vllm]`, of a model with `backend = "vllm"`.

    `python` is the interpreter of the environment that vLLM is installed in; None: this process's own. The model is
    split into `tensor_parallel` × `pipeline_parallel` parts, each on a device of its own, and there are `data_parallel`
    such copies, all behind one engine. `distributed`: how the parts run: "mp" as processes of this machine, "ray" over
    the machines of a Ray cluster that runs already. `gpus`: which cards of this machine vLLM sees; none: all.

    `memory_share` is the part of each card's memory that vLLM takes, weights included; `kv_cache_bytes`, where it is
    not 0, says what keys and values take of it instead. `quantization` is vLLM's own word for weights to be quantized
    while they are loaded ("fp8", …); "": what the checkpoint says. `eager` None: on a processor only; else graphs are
    captured. `attention` "aiexport-edge": this project's kernels in the place of vLLM's.
    """

    python: Path | None
    tensor_parallel: int
    pipeline_parallel: int
    data_parallel: int
    distributed: str
    gpus: tuple[int, ...]
    memory_share: float
    kv_cache_bytes: int
    quantization: str
    eager: bool | None
    attention: str


def read_vllm(table: Table, base: Path) -> VllmConfig:
    nothing: tuple[int, ...] = ()
    vllm = VllmConfig(
        python=table.take("python", values.path(base), None),
        tensor_parallel=table.take("tensor_parallel", values.integer(1, 1024), 1),
        pipeline_parallel=table.take("pipeline_parallel", values.integer(1, 1024), 1),
        data_parallel=table.take("data_parallel", values.integer(1, 1024), 1),
        distributed=table.take("distributed", values.one_of(DISTRIBUTED), "auto"),
        gpus=table.take("gpus", _gpus, nothing),
        memory_share=table.take("memory_share", values.share, 0.9),
        kv_cache_bytes=table.take("kv_cache_bytes", values.auto_size, 0),
        quantization=table.take("quantization", values.text, ""),
        eager=table.take("eager", values.auto_boolean, None),
        attention=table.take("attention", values.one_of(ATTENTION), "auto"),
    )
    table.end()
    if vllm.gpus and vllm.distributed == "ray":
        raise table.error("gpus", 'is for one machine; with distributed = "ray" the cluster places the parts')
    needed = vllm.tensor_parallel * vllm.pipeline_parallel * vllm.data_parallel
    if vllm.gpus and len(vllm.gpus) < needed:
        raise table.error(
            "gpus", f"lists {len(vllm.gpus)}, but tensor_parallel × pipeline_parallel × data_parallel is {needed}"
        )
    return vllm


def read_backend(table: Table, base: Path) -> VllmConfig | None:
    """`backend` and `[models.vllm]` of a model; None where the backend is the native one."""
    backend = table.take("backend", values.one_of(BACKENDS), NATIVE)
    options = table.table("vllm")
    if backend == VLLM:
        return read_vllm(options, base)
    if not options.is_empty:
        raise table.error("vllm", 'is there, but backend is not "vllm"; set it, or take the table out')
    return None


def refuse_what_vllm_lacks(table: Table, *, deterministic: bool, quantize: str, kv_cache_dtype: str) -> None:
    """Raises `ConfigError` for a setting that a model with `backend = "vllm"` cannot keep."""
    if deterministic:
        raise table.error(
            "deterministic",
            "cannot be promised by vLLM, whose numbers depend on what runs beside a request; "
            'set deterministic = false for this model, or backend = "native"',
        )
    if quantize != "none":
        raise table.error("quantize", 'is of the native backend; vLLM\'s own is "quantization" in [models.vllm]')
    if kv_cache_dtype != "auto":
        raise table.error("kv_cache_dtype", "is of the native backend; leave it out")


def _gpus(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of card numbers such as [0, 1]")
    parse: Callable[[object], int] = values.integer(0, 1023)
    found = tuple(parse(item) for item in value)
    if len(set(found)) != len(found):
        raise ValueError("names a card twice")
    return found
