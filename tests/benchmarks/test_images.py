"""The pictures' benchmark goes through, and its floor has every product of the tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aiexport_edge.engine.models.memory import vision_parameters
from aiexport_edge.engine.models.presets import PUBLISHED, published
from aiexport_edge.kernels.linear import PackedLinear
from benchmarks.images import main
from benchmarks.towers import products_alone, published_vision, random_tower, tiny


def test_a_dry_run_goes_through(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert main(["--dry-run", "--output", str(output)]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["tokens"] == 4
    assert row["floor_ms"] > 0
    assert row["images_per_s"] > 0


@torch.inference_mode()
def test_the_floor_has_every_product_of_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows through the same products, however many blocks."""
    made = random_tower(tiny(published_vision("Qwen3-VL-2B-Instruct")), dtype=torch.float32, device=torch.device("cpu"))
    made.tower.block_patches = 24
    grid = (6, 10)
    seen: list[tuple[int, int]] = []
    call = PackedLinear.__call__

    def note(self: PackedLinear, x: torch.Tensor, **options: torch.dtype) -> torch.Tensor:
        seen.append((id(self), x.shape[0]))
        return call(self, x, **options)

    floor = products_alone(made, grid)
    monkeypatch.setattr(PackedLinear, "__call__", note)
    floor()
    alone, seen[:] = sorted(seen), []
    made.tower.encode(torch.zeros(grid[0] * 16, grid[1] * 16, 3, dtype=torch.uint8))
    assert sorted(seen) == alone


@pytest.mark.parametrize("name", [path.name for path in PUBLISHED.iterdir()])
def test_towers_are_those_of_the_published_models(name: str) -> None:
    config = published(name)
    assert config is not None
    assert config.vision == published_vision(name)
    assert vision_parameters(config) > 4e8
