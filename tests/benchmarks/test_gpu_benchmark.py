"""The GPU benchmark's program where there is no GPU: it refuses clearly, and a dry run goes through every part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.report import ROOT


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=850)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_refuses_without_a_card(tmp_path: Path) -> None:
    result = benchmark("--output", str(tmp_path / "result.json"))
    assert result.returncode == 2
    assert "device cuda:0" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "result.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_goes_through(tmp_path: Path) -> None:
    result = benchmark("--dry-run", "--output", str(tmp_path / "result.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert {row["part"] for row in document["rows"]} == set(PARTS)
    assert all(row.get("ok") is not False for row in document["rows"])
    for row in document["rows"]:
        assert f"{row['part']}  {row['name']}" in result.stdout


def test_imports_only_what_a_bare_machine_has() -> None:
    """transformers and vLLM are compared with where they are installed; nothing of the server is needed."""
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'transformers', 'grpc', 'google', 'sqlalchemy', 'starlette', 'uvicorn',"
        " 'platformdirs'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import benchmarks.gpu.__main__ as program, importlib\n"
        "for module in program.PARTS.values():\n"
        "    importlib.import_module(f'benchmarks.gpu.{module}')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
