"""Which implementation an operation takes: the Triton one exactly where its tensors are on a card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_operations_on_the_cpu_import_no_triton() -> None:
    code = """
import sys, torch
from aiexport_edge.kernels.gather import gather_rows
from aiexport_edge.kernels.rms_norm import rms_norm
from aiexport_edge.kernels.rms_norm_quantized import add_rms_norm_quantized
from aiexport_edge.kernels.swiglu import swiglu
x = torch.ones(2, 8)
gather_rows(x, torch.tensor([1])); rms_norm(x, x[0], 1e-6); swiglu(x)
add_rms_norm_quantized(x, x, x[0], 1e-6, torch.int8)
print([name for name in sys.modules if name.startswith("aiexport_edge.kernels.gpu")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
