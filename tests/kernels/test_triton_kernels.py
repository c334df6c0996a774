"""The GPU kernels' proof without a GPU: interpreted against their references, and compiled for cards that are not here.

Each in processes of its own: Triton's interpreter is chosen by an environment variable before triton is imported, and
what is interpreted cannot be compiled. Here runs a representative part; `make prove` runs everything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not there for this system")

ROOT = Path(__file__).resolve().parents[2]
KERNEL_TESTS = ROOT / "tests" / "kernels" / "gpu"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process at the root; at most one thread, so that the numbers of small blocks come quickly."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_interpreted_kernels_match_their_references() -> None:
    done = run("-m", "pytest", "-q", str(KERNEL_TESTS), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_compile_within_the_limits_of_their_architectures(capfd: pytest.CaptureFixture[str]) -> None:
    """Decode attention, norm, RoPE, sampler spill no registers; shared memory fits; reads are 16 bytes wide."""
    done = run("-m", "aiexport_edge.kernels.gpu.aot", "--representative", TRITON_INTERPRET="0")
    if os.environ.get("CI"):
        with capfd.disabled():
            print("", done.stdout, sep="\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 with faults" in done.stdout
    for kernel in (
        "decode_attention",
        "merge_states",
        "prefill_attention",
        "qk_norm_rope",
        "add_rms_norm",
        "sampler",
        "packed product",
    ):
        assert f"\n{kernel} " in done.stdout, kernel


POWERS = """
import re, torch
from aiexport_edge.kernels.gpu import service
from aiexport_edge.kernels.gpu.compile import compile_launch
from aiexport_edge.kernels.gpu.launch import A100
for case in service.deterministic_cases(A100, service.QWEN3_8B, torch.bfloat16):
    if case.kernel == "prefill_attention":
        lines = compile_launch(case.launch, 80).asm["ptx"].splitlines()
        made = {m[2]: m[1] for line in lines if (m := re.match(r"\\s*(\\S+)\\s+(%\\S+), ", line))}
        print({made[m[1]] for line in lines if (m := re.match(r"\\s*ex2\\S*\\s+%\\S+, (%\\S+);", line))})
"""


@pytest.mark.slow
def test_deterministic_attention_computes_every_tile_alike() -> None:
    """No power of two is of a product and a difference in one operation: with a mask between them they cannot be, so a
    tile's bits would go by whether it needs one. No interpreter shows that."""
    done = run("-c", POWERS, TRITON_INTERPRET="0")
    assert done.stdout.strip() == "{'sub.f32'}", done.stdout + done.stderr


def test_kernels_are_not_interpreted_in_this_process() -> None:
    """The variable would leak into every other test's kernels, and into servers that tests start."""
    assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0")
