"""A long prompt beside streams that write: the benchmark's own checks (pages, the same answer from the cache) hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def measure(tmp_path: Path, *options: str) -> dict[str, dict[str, float]]:
    output = tmp_path / "result.json"
    command = [sys.executable, "-m", "benchmarks.long_context", "--output", str(output), "--threads", "1", *options]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, dict[str, float]] = json.loads(output.read_text())
    return document


def check(document: dict[str, dict[str, float]], num_tokens: int) -> None:
    assert 0.9 * num_tokens < document["long"]["prompt_tokens"] <= num_tokens
    assert document["long"]["cached_tokens"] < 100
    assert document["long_again"]["cached_tokens"] > document["long"]["prompt_tokens"] - 100
    assert document["same_answer"]
    assert document["pages"]["unbalanced"] == document["pages"]["used_at_the_end"] == 0
    assert document["pages"]["most_used"] * 16 >= document["long"]["prompt_tokens"]
    assert document["with"]["gaps"] > 0, "the others went on"


def test_others_go_on_beside_a_long_prompt(tmp_path: Path) -> None:
    """Past the demo model's own window, through YaRN."""
    check(measure(tmp_path, "--tokens", "5000", "--seconds", "0.5", "--others", "2"), 5000)


@pytest.mark.prove
@pytest.mark.timeout(3600)
def test_others_go_on_beside_a_hundred_thousand_tokens(tmp_path: Path) -> None:
    check(measure(tmp_path, "--tokens", "100000", "--seconds", "5"), 100_000)
