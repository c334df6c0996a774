"""What the engine process has to know of a model that vLLM serves, also where the native backend has no such family.

Owns the reading of these few keys; whether vLLM can run the model is vLLM's to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiexport_edge.engine.models.config_values import ModelError, Values, read_json
from aiexport_edge.engine.models.vision_config import VisionConfig, read_vision_config

SEEING = {"Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"}


@dataclass(frozen=True, slots=True)
class Shape:
    """As `ModelConfig` has them. `vision` is None also of a model that sees in another way than Qwen3-VL: of it, the
    text alone is served."""

    vocab_size: int
    context_window: int
    stop_ids: tuple[int, ...]
    vision: VisionConfig | None = None


def load_shape(directory: Path) -> Shape:
    """Reads `config.json` and `generation_config.json`. Raises ModelError naming the file and the key."""
    file = directory / "config.json"
    raw = read_json(file)
    nested = raw.get("text_config")
    values = Values({**raw, **nested} if isinstance(nested, dict) else raw, file)
    vision = None
    if set(raw.get("architectures") or ()) & SEEING:
        vision = read_vision_config(
            Values(raw, file),
            hidden_size=values.integer("hidden_size"),
            num_layers=values.integer("num_hidden_layers"),
            vocab_size=values.integer("vocab_size"),
        )
    return Shape(
        vocab_size=values.integer("vocab_size"),
        context_window=values.integer("max_position_embeddings"),
        stop_ids=_stop_ids(directory, values),
        vision=vision,
    )


def _stop_ids(directory: Path, values: Values) -> tuple[int, ...]:
    generation = directory / "generation_config.json"
    ids: Any = read_json(generation).get("eos_token_id") if generation.exists() else None
    if ids is None:
        ids = values.values.get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in listed):
        raise ModelError(f"{values.file}: eos_token_id is {ids!r}; a token id or a list of them is needed")
    return tuple(dict.fromkeys(listed))
