"""Vision towers with random weights, made on the device: real shapes without a download; and their products alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aiexport_edge.engine.models.config_values import Values
from aiexport_edge.engine.models.vision import Merger, VisionLayer, VisionTower
from aiexport_edge.engine.models.vision_config import Grid, VisionConfig, encoding_work, read_vision_config
from aiexport_edge.engine.models.vision_loader import BLOCK_PATCHES_CARD, BLOCK_PATCHES_CPU
from aiexport_edge.kernels.linear import PackedLinear

PUBLISHED = Path(__file__).resolve().parents[1] / "engine" / "models" / "published"


@dataclass(frozen=True, slots=True)
class MadeTower:
    """A tower, and the one product that it keeps to itself."""

    tower: VisionTower
    patch_embedding: PackedLinear


def published_vision(name: str) -> VisionConfig:
    """The tower of a published model."""
    file = PUBLISHED / name / "config.json"
    raw = json.loads(file.read_text())
    text = raw["text_config"]
    return read_vision_config(
        Values({**text, **raw}, file),
        hidden_size=text["hidden_size"],
        num_layers=text["num_hidden_layers"],
        vocab_size=text["vocab_size"],
    )


def tiny(config: VisionConfig) -> VisionConfig:
    """The same with little of everything: for trying programs."""
    return replace(
        config,
        num_layers=3,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        out_hidden_size=64,
        num_positions=64,
        deepstack_layers=(0, 1),
    )


def random_tower(config: VisionConfig, *, dtype: torch.dtype, device: torch.device) -> MadeTower:
    """With weights of variance 1 / inputs, as activations like."""
    width, inner = config.hidden_size, config.intermediate_size
    merged = width * config.merge_size**2

    def product(rows: int, columns: int) -> PackedLinear:
        weight = torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=columns**-0.5)
        return PackedLinear(weight, torch.zeros(rows, dtype=dtype, device=device), dtype=dtype, deterministic=False)

    def norm(size: int) -> tuple[Tensor, Tensor]:
        return torch.ones(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)

    def merger(norm_size: int) -> Merger:
        return Merger(norm(norm_size), product(merged, merged), product(config.out_hidden_size, merged))

    block = BLOCK_PATCHES_CPU if device.type == "cpu" else BLOCK_PATCHES_CARD
    patch_embedding = product(width, config.patch_elements)
    tower = VisionTower(
        config,
        patch_embedding=patch_embedding,
        positions=torch.randn(config.num_positions, width, device=device).to(dtype),
        layers=[
            VisionLayer(
                attention_norm=norm(width),
                qkv=product(3 * width, width),
                out=product(width, width),
                mlp_norm=norm(width),
                up=product(inner, width),
                down=product(width, inner),
            )
            for _ in range(config.num_layers)
        ],
        merger=merger(width),
        deepstack_mergers=[merger(merged) for _ in config.deepstack_layers],
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        block_patches=block,
    )
    return MadeTower(tower, patch_embedding)


def products_alone(made: MadeTower, grid: Grid) -> Callable[[], None]:
    """Every product of a picture of this grid on inputs of the same shapes, one after the other, nothing between."""
    tower = made.tower
    config, block = tower.config, encoding_work(tower.config, grid, tower.block_patches).block_patches
    num_patches, merge = grid[0] * grid[1], config.merge_size**2
    sizes = [min(block, num_patches - start) for start in range(0, num_patches, block)]

    def rows(count: int, columns: int) -> Tensor:
        return torch.randn(count, columns, device=tower.device).to(tower.dtype)

    calls: list[tuple[PackedLinear, Tensor]] = []
    inputs = {size: (rows(size, config.hidden_size), rows(size, config.intermediate_size)) for size in set(sizes)}
    patches = {size: rows(size, config.patch_elements) for size in set(sizes)}
    squares = {size: rows(size // merge, config.hidden_size * merge) for size in set(sizes)}
    for size in sizes:
        narrow, wide = inputs[size]
        calls.append((made.patch_embedding, patches[size]))
        for layer in tower.layers:
            calls += [(layer.qkv, narrow), (layer.out, narrow), (layer.up, narrow), (layer.down, wide)]
        for merger in (tower.merger, *tower.deepstack_mergers):
            calls += [(merger.up, squares[size]), (merger.down, squares[size])]

    def run() -> None:
        for product, x in calls:
            product(x)

    return run


def operations(tower: VisionTower, grid: Grid) -> float:
    """Of products and attention, by the tower's own account, mergers aside."""
    work = encoding_work(tower.config, grid, tower.block_patches)
    return work.num_units * work.unit_operations * tower.config.num_layers / (tower.config.num_layers + 1)
