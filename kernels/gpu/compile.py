"""Compile launches for cards that are not here, and read what the compiler made of them.

Never in a process where Triton interprets (`TRITON_INTERPRET`): there a kernel is plain Python. Tensors may be on
torch's `meta` device: specialisation looks at shapes, strides, types and alignment alone.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from aiexport_edge.kernels.gpu.launch import Launch, shared_limit

WARP = 32
REGISTERS = 65536  # of an SM, and the most a block can have
RESERVED_SHARED = 1024  # bytes the system takes of each block's shared memory
MOST_WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # of an SM
MOST_BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one block of a compiled kernel takes. `spills` and `stack` in bytes a thread, `shared` in bytes a block."""

    registers: int
    spills: int
    stack: int
    shared: int
    num_warps: int
    blocks_per_sm: int
    widest_load: int  # bytes: 16 where global memory is read 128 bits at a time

    def faults(self, capability: int, *, may_spill: bool) -> list[str]:
        """Why this cannot run, or not well, on that architecture."""
        found = []
        if self.shared > shared_limit(capability):
            found.append(f"shared memory {self.shared} > {shared_limit(capability)}")
        if self.registers * self.num_warps * WARP > REGISTERS:
            found.append(f"{self.registers} registers x {self.num_warps * WARP} threads > {REGISTERS}")
        if self.spills and not may_spill:
            found.append(f"spills {self.spills} bytes")
        return found


class _Compiler:
    """Stands where Triton expects the driver of a card: it can say what to compile for, and nothing else."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, WARP)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # type: ignore[no-any-return]  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def is_active(self) -> bool:
        return True


def compile_launch(launch: Launch, capability: int) -> Any:
    """The compiled kernel (its `asm` and `metadata`) that this launch would run on that architecture.

    From then on this process compiles and launches nothing else.
    """
    assert os.environ.get("TRITON_INTERPRET", "0") in ("", "0"), "the interpreter compiles nothing"
    driver.set_active(_Compiler(capability))
    return launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)


def resources(compiled: Any, capability: int) -> Resources:
    """Read the resources from ptxas' own report on the compiled kernel's PTX."""
    ptx = compiled.asm["ptx"]
    fusion = () if compiled.metadata.enable_fp_fusion else ("--fmad=false",)
    registers, spills, stack = _assembler_report(ptx, capability, *fusion)
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    blocks = min(
        REGISTERS // (-(-registers // 8) * 8 * WARP * num_warps),
        (shared_limit(capability) + RESERVED_SHARED) // (shared + RESERVED_SHARED),
        MOST_WARPS[capability] // num_warps,
        MOST_BLOCKS[capability],
    )
    return Resources(registers, spills, stack, shared, num_warps, blocks, _widest_load(ptx))


def _assembler_report(ptx: str, capability: int, *fusion: str) -> tuple[int, int, int]:
    """Registers, spilled bytes (stores and loads), stack bytes."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        report = subprocess.run(
            [
                get_ptxas(capability).path,
                "-v",
                *fusion,
                f"--gpu-name={target[1]}",
                str(source),
                "-o",
                f"{source}.cubin",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    used = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert used is not None, report
    assert spilled is not None, report
    return int(used[1]), int(spilled[2]) + int(spilled[3]), int(spilled[1])


def _widest_load(ptx: str) -> int:
    """Bytes of the widest read of global memory, straight to registers or asynchronously to shared memory."""
    widths = [0]
    for vector, bits in re.findall(r"ld\.global(?:\.[A-Za-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[busf](\d+)", ptx):
        widths.append(int(vector or 1) * int(bits) // 8)
    widths += [int(size, 16) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx)]
    widths += [int(size) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^;]*?\], \[[^;]*?\], (\d+)", ptx)]
    return max(widths)
