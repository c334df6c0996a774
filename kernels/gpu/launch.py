"""What a launcher decides, as a value: kernel, grid, arguments, settings. And what it decides from: the architecture.

A launcher builds a `Launch` from its tensors and an `Architecture` and runs it. The ahead-of-time check (`aot`) builds
the same launches from tensors without memory and compiles them for every architecture, so what it reports is what runs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Architecture:
    """What launch settings depend on: compute capability (80 is 8.0) and number of streaming multiprocessors (SMs)."""

    capability: int
    num_sms: int


# The card that each capability is best known by; the ahead-of-time check and the interpreter tests launch for these.
A100 = Architecture(80, 108)
A10 = Architecture(86, 72)
L40S = Architecture(89, 142)
H200 = Architecture(90, 132)
B200 = Architecture(100, 148)
RTX_PRO_6000 = Architecture(120, 188)
KNOWN = (A100, A10, L40S, H200, B200, RTX_PRO_6000)

# Dynamic shared memory a block can ask for, in bytes (CUDA C++ Programming Guide, "Compute Capabilities").
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
LOWEST_CAPABILITY = 80


class UnsupportedDevice(RuntimeError):
    """The card is older than the kernels; says what is needed."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, not yet run. `constants` are the constexprs, num_warps, num_stages and compiler options.

    Products and sums are fused unless `constants` say `enable_fp_fusion=False`: Triton's own default varies.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """All keyword arguments of the launch."""
        return {"enable_fp_fusion": True, **self.constants}

    def run(self) -> None:
        """Launch on the current stream; an empty grid launches nothing."""
        if all(self.grid):
            self.kernel[self.grid](*self.arguments, **self.options)


def shared_limit(capability: int) -> int:
    """Bytes of dynamic shared memory per block; of a capability not in the table, the next lower one's of its major."""
    known = [c for c in SHARED_LIMIT if c <= capability and c // 10 == capability // 10]
    return SHARED_LIMIT[max(known)] if known else min(SHARED_LIMIT.values())


@functools.cache
def _of_cuda_device(index: int) -> Architecture:
    properties = torch.cuda.get_device_properties(index)
    capability = 10 * properties.major + properties.minor
    if capability < LOWEST_CAPABILITY:
        raise UnsupportedDevice(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}; 8.0 or newer is needed"
        )
    return Architecture(capability, properties.multi_processor_count)


def architecture_of(device: torch.device) -> Architecture:
    """The architecture of a CUDA device; for tensors elsewhere, which only the interpreter takes, an A100's.

    Raises UnsupportedDevice below compute capability 8.0.
    """
    if device.type != "cuda":
        return A100
    return _of_cuda_device(torch.cuda.current_device() if device.index is None else device.index)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
