"""schemathesis against `/openapi.json`: no server error, nothing that the document does not say.

Left out is one of its checks, that a body which fits the schema is always accepted: a model that is not listed, a
user's message without text or an address that the operator does not allow are refused by rules that no schema states.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.scripted_engine import ScriptedEngine
from support.shim_server import ShimServer

from aiexport_edge.shim.store.keys import SCOPES

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]


def run(shim: ShimServer, directory: Path, *arguments: str) -> None:
    key = shim.store.create_key("acme", scopes=SCOPES).key
    program = Path(sys.executable).with_name("st")
    done = subprocess.run(
        [
            *(program, "run", f"{shim.base_url}/openapi.json", "--url", shim.base_url),
            *("-H", f"X-API-Key: {key}", "--request-timeout", "60", "--suppress-health-check", "all"),
            *("--exclude-checks", "positive_data_acceptance", "--seed", "1", "--warnings", "off"),
            *arguments,
        ],
        cwd=directory,  # it keeps its examples there
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_few_examples_of_everything(make_engine: Engines, make_shim: Shims, tmp_path: Path) -> None:
    run(make_shim(make_engine()), tmp_path, "--phases", "examples,fuzzing", "--max-examples", "3")


@pytest.mark.prove
@pytest.mark.timeout(1600)
def test_all_phases(make_engine: Engines, make_shim: Shims, tmp_path: Path) -> None:
    """Coverage of every keyword, fuzzing, and links from one call to the next."""
    phases = ("--phases", "examples,coverage,fuzzing,stateful")
    run(make_shim(make_engine()), tmp_path, *phases, "--max-examples", "100", "--continue-on-failure")
