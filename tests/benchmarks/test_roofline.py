"""The bounds of an H200 that the kernels' design aims for: worked out by hand once, to be found by the program."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import roofline


def config(hidden: int, inner: int, layers: int, q_heads: int, kv_heads: int, **more: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": q_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        **more,
    }


SHAPES = {
    "Qwen3-0.6B": config(1024, 3072, 28, 16, 8),
    "Qwen3-4B": config(2560, 9728, 36, 32, 8),
    "Qwen3-8B": config(4096, 12288, 36, 32, 8),
    "Qwen3-32B": config(5120, 25600, 64, 64, 8),
    "Qwen3-30B-A3B": config(2048, 6144, 48, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
}


@pytest.mark.parametrize(
    ("name", "element_bytes", "tokens_per_second"),
    [
        ("Qwen3-0.6B", 2, (3284, 2017, 27798, 4402, 35218)),
        ("Qwen3-4B", 2, (525, 465, 10686, 2947, 23572)),
        ("Qwen3-8B", 2, (281, 263, 6891, 2558, 20464)),
        ("Qwen3-8B", 1, (520, 489, 12973, 5000, 40003)),
        ("Qwen3-32B", 2, (67, 65, 1896, 1037, 8296)),
        ("Qwen3-30B-A3B", 2, (695, 624, 2444, 1745, 12769)),
    ],
)
def test_decode_bounds(name: str, element_bytes: int, tokens_per_second: tuple[int, ...]) -> None:
    shape = roofline.shape_of(SHAPES[name])
    speeds = [
        batch
        / roofline.decode_seconds(
            shape,
            batch,
            context,
            bandwidth=roofline.H200_BANDWIDTH,
            weight_bytes=element_bytes,
            kv_bytes=element_bytes,
        )
        for batch, context in roofline.DECODE_POINTS
    ]
    assert speeds == pytest.approx(tokens_per_second, abs=0.5)


@pytest.mark.parametrize(
    ("name", "thousands_per_second"),
    [
        ("Qwen3-0.6B", (791, 434)),
        ("Qwen3-4B", (104, 82)),
        ("Qwen3-8B", (55.7, 48.4)),
        ("Qwen3-32B", (12.4, 11.1)),
        ("Qwen3-30B-A3B", (135, 91)),
    ],
)
def test_prefill_bounds(name: str, thousands_per_second: tuple[float, ...]) -> None:
    shape = roofline.shape_of(SHAPES[name])
    speeds = [
        num_tokens / roofline.prefill_seconds(shape, num_tokens, flops=roofline.H200_TFLOPS) / 1000
        for num_tokens in roofline.PREFILL_POINTS
    ]
    assert speeds == pytest.approx(thousands_per_second, rel=5e-3)


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A nested text configuration, another card, and a directory in place of a file."""
    nested = {"text_config": SHAPES["Qwen3-8B"], "vision_config": {"hidden_size": 1}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    monkeypatch.setattr(sys, "argv", ["roofline", str(tmp_path), "--json", "--bandwidth", "8.6"])
    roofline.main()
    (row,) = json.loads(capsys.readouterr().out).values()
    assert row["decode B1 1k"] == pytest.approx(2 * 281, abs=1)
    assert row["prefill 1k"] == pytest.approx(55_659, abs=1)
