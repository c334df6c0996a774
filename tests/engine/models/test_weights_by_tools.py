"""Checkpoints that the formats' public tools made: logits beside those of the tool's own dequantized weights.

Small ones are kept in `weights_by_tools/`, as the tools wrote them. `pytest -m prove` has the tools make them anew, and
of a trained model besides: AIEXPORT_TEST_LLMCOMPRESSOR_PYTHON, …_AUTO_ROUND_…, …_GPTQMODEL_… and …_AUTOAWQ_… name
interpreters that have one each (their requirements contradict each other, and some take minutes to install).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import quantization_tools
from support.decoding import logits_of

from aiexport_edge.engine.models.loader import LoadedModel, load_model
from aiexport_edge.kernels import linear

FIXTURES = Path(__file__).parent / "weights_by_tools"
CASES = sorted(directory.name for directory in FIXTURES.iterdir() if directory.is_dir())
LARGEST_BYTES = 150_000
DATA = Path(os.environ.get("AIEXPORT_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
# |logits - expected| / |expected|. Decoded into float32 nothing but the order of sums differs; AutoRound's own product
# in eight bits rounds more. Served, rows are rounded to int8, which in a mixture may choose another expert.
EXACT, ROUNDED_ROWS, OTHER_EXPERTS = 1e-5, 0.04, 0.15
WITHOUT_GROUPS = ("auto-round", "llmcompressor-fp8", "llmcompressor-w8a")  # AutoRound leaves out what does not fit
INEXACT = {"auto-round-8-bits-in-some": 3e-4}


def error_of(model: LoadedModel, directory: Path) -> float:
    expected = load_file(directory / "expected.safetensors")
    logits = logits_of(model, expected["ids"])
    return float((logits - expected["logits"]).norm() / expected["logits"].norm())


def check(directory: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """With the weights decoded into float32, and as they are served."""
    with monkeypatch.context() as patch:
        patch.setattr(linear, "_pack_bits", lambda *arguments, **options: None)
        decoded = error_of(load_model(directory, dtype="float32"), directory)
    served = error_of(load_model(directory, dtype="float32"), directory)
    assert decoded <= INEXACT.get(directory.name, EXACT)
    assert served <= (OTHER_EXPERTS if "experts" in directory.name else ROUNDED_ROWS)
    return decoded, served


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_their_tool_makes_of_them(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made_by = json.loads((FIXTURES / case / "made_by.json").read_text())
    assert made_by["case"] == case
    assert sum(file.stat().st_size for file in (FIXTURES / case).iterdir()) <= LARGEST_BYTES
    check(FIXTURES / case, monkeypatch)


def test_every_tool_is_there() -> None:
    tools = {quantization_tools.CASES[case][0] for case in CASES}
    assert tools == {"llmcompressor", "auto-round", "gptqmodel", "autoawq"}


@pytest.mark.prove
@pytest.mark.parametrize("source", ["random", "stories260K"])
@pytest.mark.parametrize("case", sorted(quantization_tools.CASES))
def test_tools_now(case: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, family, _ = quantization_tools.CASES[case]
    name = f"AIEXPORT_TEST_{tool.upper().replace('-', '_')}_PYTHON"
    python = os.environ.get(name)
    if not python:
        pytest.skip(f"{name} names no interpreter that has {tool}")
    arguments = [python, quantization_tools.__file__, case, str(tmp_path / case)]
    if source != "random":
        arguments.append(str(_trained(source, case, family)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    decoded, served = check(tmp_path / case, monkeypatch)
    print(f"{case} {source}: decoded {decoded:.1e}, served {served:.1e}")


def _trained(name: str, case: str, family: str) -> Path:
    if family != "llama":
        pytest.skip(f"{name} is no {family}")
    if not case.startswith(WITHOUT_GROUPS):
        pytest.skip(f"the 172 inputs of its down_proj are no whole groups of 32, which {case} needs")
    directory = DATA / "models" / name
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there: AIEXPORT_TEST_DATA names the shared data")
    return directory
