"""What `doctor` says on a machine with an NVIDIA card, here a script in nvidia-smi's place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pytest

from aiexport_edge.shim.cli import card_checks
from aiexport_edge.shim.cli.check import OK, PROBLEM, WARNING, Check


def put(directory: Path, name: str, script: str) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all of PATH."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    monkeypatch.delenv("CC", raising=False)
    return directory


def smi(directory: Path, cards: list[tuple[str, str]]) -> None:
    """An nvidia-smi that lists names and capabilities."""
    names = "\\n".join(f"{name}, 143771 MiB, 580.1" for name, _ in cards)
    capabilities = "\\n".join(capability for _, capability in cards)
    put(directory, "nvidia-smi", f'case "$1" in *name*) printf "{names}\\n";; *) printf "{capabilities}\\n";; esac')


def one(checks: Iterable[Check]) -> Check:
    (check,) = checks
    return check


def named(name: str, checks: Iterable[Check]) -> Check:
    return next(check for check in checks if check.name == name)


def test_cards_and_what_they_can(programs: Path) -> None:
    smi(programs, [("NVIDIA H200", "9.0"), ("Tesla T4", "7.5")])
    assert card_checks.has_card()
    good, old = card_checks.cards()
    assert (good.status, good.detail) == (OK, "NVIDIA H200, 143771 MiB, 580.1, compute capability 9.0")
    assert old.status == PROBLEM
    assert "compute capability 7.5, and the kernels need 8.0" in old.detail
    assert "device" in old.remedy


def test_a_driver_that_cannot_say_the_capability(programs: Path) -> None:
    put(programs, "nvidia-smi", 'case "$1" in *name*) echo "NVIDIA A10, 1 MiB, 450.1";; *) exit 6;; esac')
    assert one(card_checks.cards()) == Check("gpu", OK, "NVIDIA A10, 1 MiB, 450.1")


def test_a_driver_that_does_not_work(programs: Path) -> None:
    put(programs, "nvidia-smi", "echo no devices were found >&2; exit 9")
    check = one(card_checks.cards())
    assert (check.status, check.detail) == (PROBLEM, "no devices were found")
    assert check.remedy


def test_no_compiler(programs: Path, tmp_path: Path) -> None:
    put(programs, "cc", "exit 0")  # Triton does not look for it
    check = named("c compiler", card_checks.triton(tmp_path))
    assert check.status == PROBLEM
    assert "install gcc" in check.remedy


def test_a_compiler_that_does_not_compile(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    put(programs, "gcc", "echo 'stdio.h: no such file' >&2; exit 1")
    check = named("c compiler", card_checks.triton(tmp_path))
    assert check.status == PROBLEM
    assert "cannot compile a small program: stdio.h: no such file" in check.detail


def test_no_headers(programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(programs, "gcc", "exit 0")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "none")})
    check = named("python headers", card_checks.triton(tmp_path))
    assert check.status == PROBLEM
    assert f"python3.{sys.version_info.minor}-dev" in check.remedy


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
@pytest.mark.skipif(not Path(sysconfig.get_paths()["include"], "Python.h").is_file(), reason="no Python headers here")
def test_a_compiler_that_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert named("c compiler", card_checks.triton(tmp_path)).status == OK


def test_the_cache(programs: Path, tmp_path: Path) -> None:
    assert named("kernel cache", card_checks.triton(tmp_path / "state" / "kernels")).status == WARNING
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kernel").write_text("")
    assert named("kernel cache", card_checks.triton(tmp_path / "full")).status == OK
    check = named("kernel cache", card_checks.triton(tmp_path / "full" / "kernel" / "below"))
    assert check.status == PROBLEM
    assert "TRITON_CACHE_DIR" in check.remedy


def test_doctor_looks_at_all_of_it_where_there_is_a_card(programs: Path, tmp_path: Path) -> None:
    smi(programs, [("NVIDIA H200", "9.0")])
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "doctor", "--state", str(tmp_path / "state")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False)
    said = {line.split(maxsplit=1)[1].split(":")[0] for line in done.stdout.splitlines() if not line.startswith(" ")}
    assert {"gpu", "triton", "c compiler", "kernel cache"} <= said
