"""What a core's import of torch leaves out, seen from a process of its own: here torch is imported whole."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

IMPORT = """
import sys, threading
from aiexport_edge.engine.core.torch_start import import_torch
threads = [threading.Thread(target=import_torch) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import torch
"""

has_known_build = pytest.mark.skipif(
    not (torch.__version__.startswith("2.13.") and torch.__version__.endswith("+cpu")),
    reason="this build of torch is imported whole",
)


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", IMPORT + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_operations_are_all_there() -> None:
    code = (
        "print(torch.equal(torch.eye(3) @ torch.eye(3), torch.eye(3)), torch.randn(2, 3).softmax(1).argmax(1).numel())"
    )
    assert run(code) == ["True", "2"]


@has_known_build
def test_what_shapes_alone_need_is_left_out() -> None:
    left_out = ["torch._meta_registrations", "torch._refs", "torch._decomp.decompositions", "torch._prims"]
    assert run(f"print([name for name in {left_out} if name in sys.modules])") == ["[]"]


@has_known_build
def test_who_wants_it_after_all_can_have_it() -> None:
    code = "import torch._meta_registrations\n"
    code += "print(torch.Generator().manual_seed(3).initial_seed(), *(torch.empty(2, 5, device='meta') @ torch.empty("
    assert run(code + "5, 3, device='meta')).shape)") == ["3", "2", "3"]
