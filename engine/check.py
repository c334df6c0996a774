"""`python -m aiexport_edge.engine.check --config FILE [--card GB]`: what a configuration's models take of memory.

Prints one JSON document: by model, its parameters, the bytes that its weights, a token and a request of the whole
context window take; with `--card`, whether all of that fits into a card of that size, and what would. Needs neither
weights (the configurations of well-known models come with the product) nor a card. Exit status: 0, or 1 with a sentence
under "problem". `--preset` prints the document of a preset instead, "toml" and "table" in it. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aiexport_edge.engine.models.config import ModelConfig, ModelError
from aiexport_edge.engine.models.memory import CARD_MIB, CardMemory, Served, card_memory
from aiexport_edge.engine.models.presets import (
    CARD_QUANTIZATIONS,
    PUBLISHED,
    preset,
    presets,
    to_table,
    to_toml,
)
from aiexport_edge.engine.models.window import served_window, yarn_of
from aiexport_edge.proto.config import Config, ConfigError, WeightsSpec, load, source_directory


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m aiexport_edge.engine.check", description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--card", type=int, help="GB of the card's memory")
    parser.add_argument("--preset", action="store_true")
    options = parser.parse_args(argv)
    try:
        document = (
            _presets(options.card) if options.preset else check(load(options.config, options.state), options.card)
        )
    except (ConfigError, ModelError) as error:
        document = {"ok": False, "problem": str(error)}
    print(json.dumps(document))
    return 0 if document["ok"] else 1


def check(config: Config, card: int | None) -> dict[str, Any]:
    """The document. Raises `ConfigError` and `ModelError` for what no card would change."""
    # A card that nobody sells is estimated too; what a driver keeps of it is small.
    card_bytes = 0 if card is None else CARD_MIB.get(card, card * 1000 - 200) << 20
    engine = config.engine
    served = [_served(config, weights) for weights in config.weights if weights.vllm is None]
    document: dict[str, Any] = {"ok": True, "problem": None, "models": [], "card": None}
    if not served:
        return document
    memory = card_memory(
        served,
        card_bytes,
        max_num_running=engine.max_num_running,
        max_step_tokens=engine.max_step_tokens,
        memory_share=engine.memory_share,
        pool_bytes=engine.pool_bytes,
        adapter_slots=config.adapters.card_slots,
        max_adapter_rank=config.adapters.card_rank,
        max_image_tokens=config.images.max_tokens,
    )
    document["models"] = [asdict(model) for model in memory.models]
    if card is None:
        for model in document["models"]:
            del model["pool_tokens"]
        return document
    problem = _not_on_a_card(config) or _problem(config, card, memory)
    document |= {"ok": problem is None, "problem": problem}
    document["card"] = {
        "gb": card,
        "bytes": memory.card_bytes,
        "weight_bytes": memory.weight_bytes,
        "step_bytes": memory.step_bytes,
        "picture_bytes": memory.picture_bytes,
        "adapter_bytes": memory.adapter_bytes,
        "pool_bytes": memory.pool_bytes,
    }
    return document


def _served(config: Config, weights: WeightsSpec) -> Served:
    directory, yarn = source_directory(weights.source), yarn_of(weights)
    if not directory.exists() and (PUBLISHED / directory.name).is_dir():
        directory = PUBLISHED / directory.name
    model = ModelConfig.load(directory, yarn=yarn)
    is_wide = weights.dtype == "float32" or (weights.dtype == "auto" and model.dtype == "float32")
    window = served_window(config, weights, model)
    is_made_for_fp8 = model.quantization is not None and model.quantization.fp8_kv_cache
    kv_bytes = 1 if weights.kv_cache_dtype == "fp8" or is_made_for_fp8 else 0
    return Served(weights.name, model, weights.quantize, window, item_bytes=4 if is_wide else 2, kv_item_bytes=kv_bytes)


def _not_on_a_card(config: Config) -> str | None:
    """What cards do not compute with."""
    for weights in config.weights:
        if weights.vllm is None and weights.quantize not in CARD_QUANTIZATIONS:
            return (
                f'{weights.name}: quantize = "{weights.quantize}" is for processors; on a card there is '
                f"{', '.join(CARD_QUANTIZATIONS)}"
            )
    return None


def _problem(config: Config, card: int, memory: CardMemory) -> str | None:
    gib = 1 << 30
    if memory.pool_bytes <= 0:
        return (
            f"a card of {card} GB has {memory.card_bytes / gib:.1f} GiB, and weights ({memory.weight_bytes / gib:.1f} "
            f"GiB), steps, pictures and adapters take {(memory.card_bytes - memory.pool_bytes) / gib:.1f}; serve "
            "smaller models, or fewer"
        )
    for model in memory.models:
        if model.fits:
            continue
        index = next(index for index, spec in enumerate(config.models) if spec.weights == model.name)
        return str(
            ConfigError(
                config.path,
                f"models.{index}.context_window",
                f"is {model.window} tokens of {model.name}, but on a card of {card} GB the page pool holds "
                f"{model.pool_tokens} of them; set context_window = {model.pool_tokens // 1000 * 1000}, or serve "
                "smaller models",
            )
        )
    return None


def _presets(card: int | None) -> dict[str, Any]:
    if card is None:
        return {"ok": True, "problem": None, "table": to_table(list(presets())), "cards": sorted(CARD_MIB)}
    if card not in CARD_MIB:
        sizes = ", ".join(map(str, sorted(CARD_MIB)))
        return {"ok": False, "problem": f"there is no preset for a card of {card} GB; there are {sizes}"}
    chosen = preset(card)
    return {"ok": True, "problem": None, "toml": to_toml(chosen), "preset": asdict(chosen)}


if __name__ == "__main__":
    sys.exit(main())
