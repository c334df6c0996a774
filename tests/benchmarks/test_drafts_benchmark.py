"""The benchmark of drafts on a few prompts: every answer is the same with and without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_answers_are_the_same_and_steps_are_saved(tmp_path: Path) -> None:
    output = tmp_path / "drafts.json"
    command = [sys.executable, "-m", "benchmarks.drafts", "--prompts", "2", "--threads", "1", "--output", str(output)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["prompts"]: row for row in json.loads(output.read_text())["rows"]}
    assert all(row["equal"] == row["count"] == 2 for row in rows.values())
    assert rows["told again"]["ids_per_step"] > 1.2
    assert rows["JSON Schema"]["ids_per_step"] > 1.5
