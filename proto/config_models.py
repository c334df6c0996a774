"""`[[models]]`: what clients may ask for, and the sets of weights behind it. Without any, the demo model is every tier.

Entries that agree in all that the engine reads share one set of weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_rope import RopeScaling, rope_scaling
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.config_values import DEMO, FAMILIES
from aiexport_edge.proto.config_vllm import VllmConfig, read_backend, refuse_what_vllm_lacks

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "int4", "fp8")
KV_CACHE_DTYPES = ("auto", "fp8")


@dataclass(frozen=True, slots=True)
class WeightsSpec:
    """One loaded model. `name` is what the engine's gRPC calls it; `source` is "demo" or an absolute directory.

    `vllm` None: the native backend serves it.
    """

    name: str
    source: str
    dtype: str
    quantize: str  # what weights are rounded to while they are loaded
    context_window: int  # tokens; 0: the model's own
    deterministic: bool
    vllm: VllmConfig | None
    rope_scaling: RopeScaling | None  # in the place of the checkpoint's own
    kv_cache_dtype: str  # of keys and values; "auto": the model's, or what its checkpoint is made for


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One `[[models]]` entry: what clients see. The first of `ids` is the main one; `weights` names a `WeightsSpec`."""

    ids: tuple[str, ...]
    family: str
    display_name: str
    source: str
    dtype: str
    quantize: str
    context_window: int  # tokens; 0: the model's own
    max_output_tokens: int  # 0: the smaller of 8192 and the context window
    input_per_million: float  # US dollars
    output_per_million: float
    created_at: datetime  # in UTC
    deterministic: bool
    json_mode: bool  # whether `response_format` may ask for JSON
    vllm: VllmConfig | None  # None: the native backend serves it
    rope_scaling: RopeScaling | None
    weights: str

    @property
    def id(self) -> str:
        return self.ids[0]


# What two entries must agree in to be served by one set of weights: the fields of a `WeightsSpec` but its name.
_Shared = tuple[str, str, str, int, bool, VllmConfig | None, RopeScaling | None, str]


def read_models(
    root: Table, base: Path, engine_deterministic: bool | None
) -> tuple[tuple[ModelSpec, ...], tuple[WeightsSpec, ...]]:
    entries = root.take("models", values.tables, list(_DEMO_MODELS))
    models: list[ModelSpec] = []
    weights: dict[_Shared, WeightsSpec] = {}
    seen: dict[str, int] = {}
    for index, raw in enumerate(entries):
        table = Table(root.file, f"models.{index}", raw)
        model = _model(table, base, engine_deterministic, weights)
        for model_id in model.ids:
            if model_id in seen:
                raise table.error("ids", f'"{model_id}" is already an id of models.{seen[model_id]}; ids are unique')
            seen[model_id] = index
        models.append(model)
    return tuple(models), tuple(weights.values())


def _model(
    table: Table,
    base: Path,
    engine_deterministic: bool | None,
    weights: dict[_Shared, WeightsSpec],
) -> ModelSpec:
    nothing: tuple[str, ...] = ()
    ids = table.take("ids", values.model_ids, nothing)
    family = table.take("family", values.one_of(FAMILIES), "")
    source = table.take("source", values.source(base), "")
    display_name = table.take("display_name", values.text, "")
    dtype = table.take("dtype", values.one_of(DTYPES), "auto")
    quantize = table.take("quantize", values.one_of(QUANTIZATIONS), "none")
    kv_cache_dtype = table.take("kv_cache_dtype", values.one_of(KV_CACHE_DTYPES), "auto")
    context_window = table.take("context_window", values.integer(0, 1 << 24), 0)
    max_output_tokens = table.take("max_output_tokens", values.integer(0, 1 << 24), 0)
    input_per_million = table.take("input_per_million", values.price, 0.0)
    output_per_million = table.take("output_per_million", values.price, 0.0)
    created_at = table.take("created_at", values.time, datetime(2025, 4, 1, tzinfo=UTC))
    scaling: RopeScaling | None = table.take("rope_scaling", rope_scaling, None)
    vllm = read_backend(table, base)
    default = engine_deterministic if engine_deterministic is not None else source == DEMO and vllm is None
    deterministic = table.take("deterministic", values.boolean, default)
    json_mode = table.take("json_mode", values.boolean, family != "haiku")
    table.end()
    if vllm is not None:
        refuse_what_vllm_lacks(table, deterministic=deterministic, quantize=quantize, kv_cache_dtype=kv_cache_dtype)
        if scaling is not None:
            raise table.error(
                "rope_scaling", "is of the native backend; for vLLM write it into the model's config.json"
            )
    for key, value in (("ids", ids), ("family", family), ("source", source)):
        if not value:
            raise table.error(key, f"is missing; {_MODEL_REMEDIES[key]}")
    if context_window and max_output_tokens > context_window:
        raise table.error("max_output_tokens", f"must be at most the context_window, {context_window}")
    shared = (source, dtype, quantize, context_window, deterministic, vllm, scaling, kv_cache_dtype)
    if shared not in weights:
        weights[shared] = WeightsSpec(_weights_name(source, weights.values()), *shared)
    return ModelSpec(
        ids=ids,
        family=family,
        display_name=display_name or ids[0],
        source=source,
        dtype=dtype,
        quantize=quantize,
        context_window=context_window,
        max_output_tokens=max_output_tokens,
        input_per_million=input_per_million,
        output_per_million=output_per_million,
        created_at=created_at,
        deterministic=deterministic,
        json_mode=json_mode,
        vllm=vllm,
        rope_scaling=scaling,
        weights=weights[shared].name,
    )


def _weights_name(source: str, others: Iterable[WeightsSpec]) -> str:
    """The directory's name, numbered where another model already has it."""
    taken = {other.name for other in others}
    name = base = source if source == DEMO else (Path(source).name or "model")
    number = 2
    while name in taken:
        name = f"{base}-{number}"
        number += 1
    return name


# ---------------------------------------------------------------------------------------------------- defaults

_MODEL_REMEDIES = {
    "ids": 'list what clients call it, such as ["apex-haiku-4-20250401"]',
    "family": "say opus, sonnet or haiku",
    "source": 'name a Hugging Face model directory, or "demo"',
}


def _demo_model(model_id: str, family: str, name: str, prices: tuple[float, float], created: str) -> dict[str, Any]:
    return {
        "ids": [model_id],
        "family": family,
        "display_name": name,
        "source": DEMO,
        "input_per_million": prices[0],
        "output_per_million": prices[1],
        "created_at": created,
    }


_DEMO_MODELS = (
    _demo_model("apex-opus-3-20250401", "opus", "Apex Opus 3", (15.0, 75.0), "2025-04-01T00:00:00Z"),
    _demo_model("apex-sonnet-4-20250501", "sonnet", "Apex Sonnet 4", (3.0, 15.0), "2025-05-01T00:00:00Z"),
    _demo_model("apex-haiku-4-20250401", "haiku", "Apex Haiku 4", (0.25, 1.25), "2025-04-01T00:00:00Z"),
)
