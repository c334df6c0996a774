"""The expert path's benchmark goes through, and its three ways compute the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from aiexport_edge.kernels.moe import route
from benchmarks.moe import TINY, Layer, main


def test_a_dry_run_goes_through(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    assert main(["--dry-run", "--tokens", "1", "9", "--output", str(output)]) == 0
    document = json.loads(output.read_text())
    assert [(row["quantize"], row["tokens"]) for row in document["rows"]] == [
        ("none", 1),
        ("none", 9),
        ("int8", 1),
        ("int8", 9),
    ]
    assert all(row["ours_ms"] > 0 and row["floor_ms"] > 0 for row in document["rows"])


@torch.inference_mode()
def test_the_loop_computes_what_the_experts_do() -> None:
    torch.manual_seed(1)
    layer = Layer(TINY, "none")
    x = torch.randn(11, TINY["hidden"]).to(layer.dtype)
    chosen = route(torch.randn(11, TINY["experts"]), TINY["top_k"], normalize=True)
    torch.testing.assert_close(layer.ours(x, *chosen), layer.loop(x, *chosen), rtol=2e-2, atol=2e-2)
