"""Node, for tests of what JavaScript clients do."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed (Debian: nodejs, npm)")


def run_node(directory: Path, script: str, **environment: str) -> str:
    """Runs an ES module in `directory` and returns its stdout."""
    file = directory / "script.mjs"
    file.write_text(script, encoding="utf-8")
    done = subprocess.run(
        ["node", str(file)],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
