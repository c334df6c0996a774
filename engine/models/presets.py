"""The three tiers on one card: which model serves each, how its weights are rounded, and how long its context is.

Owns the choice for every size of card; what fits is computed (`memory.py`), so that a table, a file and `config check`
never differ. Ids, families, contexts and prices are those of the vendor's page; a context is shorter where the card's
memory does not do for one request of its length. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.engine.models.memory import CARD_MIB, CardMemory, Served, card_memory

PUBLISHED = Path(__file__).parent / "published"  # configurations of models that people serve, by directory name
CARD_QUANTIZATIONS = ("none", "int8", "int4", "fp8")  # what a card computes with
# Where memory is short: pictures of up to 2,048 by 2,048 pixels; larger ones are made smaller. 0: the model's bound.
IMAGE_TOKENS = {8: 4096, 16: 4096, 24: 4096, 48: 0, 80: 0, 141: 0}
# Where contexts would be short of the vendor's: keys and values in FP8, half the bytes.
FP8_CACHE = frozenset({8, 16, 24, 48, 80})
MAX_NUM_RUNNING = 32
MEMORY_SHARE = 0.9
ROUND_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class Tier:
    """What the vendor's page says of one: prices in US dollars per million tokens."""

    id: str
    family: str
    display_name: str
    window: int
    input_per_million: float
    output_per_million: float
    created_at: str


TIERS = (
    Tier("apex-opus-3-20250401", "opus", "Apex Opus 3", 200_000, 15.0, 75.0, "2025-04-01T00:00:00Z"),
    Tier("apex-sonnet-4-20250501", "sonnet", "Apex Sonnet 4", 200_000, 3.0, 15.0, "2025-05-01T00:00:00Z"),
    Tier("apex-haiku-4-20250401", "haiku", "Apex Haiku 4", 100_000, 0.25, 1.25, "2025-04-01T00:00:00Z"),
)
Choice = tuple[tuple[str, str], tuple[str, str], tuple[str, str]]  # by tier: a size of Qwen3-VL, and its rounding
# Opus the largest that leaves room for a long context, then smaller ones.
CHOICES: dict[int, Choice] = {
    8: (("4B", "int4"), ("4B", "int4"), ("4B", "int4")),
    16: (("8B", "int4"), ("8B", "int4"), ("2B", "int4")),
    24: (("8B", "int4"), ("8B", "int4"), ("4B", "int4")),
    48: (("30B-A3B", "int4"), ("30B-A3B", "int4"), ("4B", "fp8")),
    80: (("32B", "int4"), ("30B-A3B", "int4"), ("4B", "fp8")),
    141: (("32B", "fp8"), ("30B-A3B", "fp8"), ("4B", "none")),
}


@dataclass(frozen=True, slots=True)
class TierPreset:
    """One tier on a card."""

    tier: Tier
    model: str  # the directory's name
    quantize: str
    window: int


@dataclass(frozen=True, slots=True)
class Preset:
    """A card's configuration, and what it comes to in memory: `memory.models` are the sets of weights."""

    card: int  # GB
    tiers: tuple[TierPreset, ...]
    memory: CardMemory


def preset(card: int) -> Preset:
    """For a card of so many GB, one of CARD_MIB."""
    chosen = [(f"Qwen3-VL-{size}-Instruct", quantize) for size, quantize in CHOICES[card]]
    windows = {each: max(tier.window for tier, of in zip(TIERS, chosen, strict=True) if of == each) for each in chosen}
    # One request may take the whole pool: a window is as long as that, and no longer than the vendor's. It shrinks in
    # small steps, since a shorter one leaves more for the pool.
    while not (memory := _memory(card, windows)).fits:
        for each, model in zip(windows, memory.models, strict=True):
            if not model.fits:
                windows[each] = max(model.pool_tokens, int(0.98 * model.window))
    for each, window in windows.items():
        windows[each] = window // ROUND_TOKENS * ROUND_TOKENS
    tiers = tuple(TierPreset(tier, *each, windows[each]) for tier, each in zip(TIERS, chosen, strict=True))
    return Preset(card, tiers, _memory(card, windows))


def presets() -> Iterator[Preset]:
    """Every card's."""
    return map(preset, CARD_MIB)


@cache
def published(name: str) -> ModelConfig | None:
    """The configuration that a model of this directory name is published with."""
    directory = PUBLISHED / name
    return ModelConfig.load(directory) if (directory / "config.json").is_file() else None


def to_toml(of: Preset) -> str:
    """A configuration file."""
    lines = [
        f"# The three tiers on a card of {of.card} GB, as `aiexport-edge config preset --card {of.card}` prints it.",
        f"# {_sentence(of)}",
        "# The directories come from Hugging Face (Qwen/…); paths count from this file's folder. Check it, also before",
        f"# they are there: aiexport-edge config check THIS_FILE --card {of.card}",
        "",
        "[engine]",
        f"max_num_running = {MAX_NUM_RUNNING}",
        f"memory_share = {MEMORY_SHARE}",
    ]
    if IMAGE_TOKENS[of.card]:
        lines += ["", "[images]", f"max_tokens = {IMAGE_TOKENS[of.card]}"]
    for each in of.tiers:
        tier = each.tier
        lines += [
            "",
            "[[models]]",
            f'ids = ["{tier.id}"]',
            f'family = "{tier.family}"',
            f'display_name = "{tier.display_name}"',
            f'source = "models/{each.model}"',
            f'quantize = "{each.quantize}"',
            *(['kv_cache_dtype = "fp8"'] if of.card in FP8_CACHE else []),
            f"context_window = {each.window}",
            f"input_per_million = {tier.input_per_million}",
            f"output_per_million = {tier.output_per_million}",
            f"created_at = {tier.created_at}",
        ]
    return "\n".join(lines) + "\n"


def to_table(all_of: Sequence[Preset]) -> str:
    """All cards as a Markdown table."""
    gib = 1 << 30
    lines = [
        "| Card | Opus | Sonnet | Haiku | Weights | Left for pages | Tokens they hold |",
        "|---:|---|---|---|---:|---:|---|",
    ]
    for of in all_of:
        tiers = " | ".join(f"{_short(each)}, {each.window // 1000} K" for each in of.tiers)
        tokens = ", ".join(f"{_size(model.name)} {model.pool_tokens // 1000} K" for model in of.memory.models)
        weights, pool = of.memory.weight_bytes / gib, of.memory.pool_bytes / gib
        lines.append(f"| {of.card} GB | {tiers} | {weights:.1f} GiB | {pool:.1f} GiB | {tokens} |")
    return "\n".join(lines) + "\n"


def _memory(card: int, windows: dict[tuple[str, str], int]) -> CardMemory:
    served = []
    for (name, quantize), window in windows.items():
        config = published(name)
        assert config is not None
        served.append(Served(name, config, quantize, window, kv_item_bytes=1 if card in FP8_CACHE else 0))
    return card_memory(
        served,
        CARD_MIB[card] << 20,
        max_num_running=MAX_NUM_RUNNING,
        max_step_tokens=0,
        memory_share=MEMORY_SHARE,
        max_image_tokens=IMAGE_TOKENS[card],
    )


def _sentence(of: Preset) -> str:
    gib = 1 << 30
    return (
        f"Weights {of.memory.weight_bytes / gib:.1f} GiB, all resident; {of.memory.pool_bytes / gib:.1f} GiB are left "
        "for keys and values."
    )


def _short(each: TierPreset) -> str:
    rounding = "bf16" if each.quantize == "none" else each.quantize
    return f"{_size(each.model)} {rounding}"


def _size(name: str) -> str:
    return name.removeprefix("Qwen3-VL-").removesuffix("-Instruct")
