"""Which device a core runs on. Knows no models; refuses what cannot work with a sentence that says what to do."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Protocol

import torch

from aiexport_edge.engine.models.config import ModelError

LOWEST_CAPABILITY = (8, 0)
CACHE_VARIABLE = "TRITON_CACHE_DIR"


class Cards(Protocol):
    """What is asked of `torch.cuda`."""

    def is_available(self) -> bool: ...

    def device_count(self) -> int: ...

    def get_device_capability(self, device: int) -> tuple[int, int]: ...

    def get_device_name(self, device: int) -> str: ...


def select_device(name: str, *, cards: Cards = torch.cuda, built_for_cuda: bool | None = None) -> torch.device:
    """The device called `name`: "cpu", "cuda:1", "cuda" (the first card), or "auto".

    "auto" is the first card where it can run the kernels, else the CPU. Raises ModelError for a device that is not
    there, is too old for the kernels (compute capability below 8.0), or has no name of that form.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        usable = cards.is_available() and cards.get_device_capability(0) >= LOWEST_CAPABILITY
        return torch.device("cuda", 0) if usable else torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise ModelError(f"there is no device {name}; use auto, cpu or cuda:0 (cuda:1 for the second card, and so on)")
    index = int(match[1] or 0)
    if built_for_cuda is None:
        built_for_cuda = torch.version.cuda is not None
    if not built_for_cuda:
        raise ModelError(
            f"device {name}: this PyTorch ({torch.__version__}) was built without CUDA; install a build with it "
            "(https://pytorch.org/get-started) or use device cpu"
        )
    if not cards.is_available():
        raise ModelError(f"device {name}: no NVIDIA driver answers; see what nvidia-smi says, or use device cpu")
    count = cards.device_count()
    if index >= count:
        there = "cuda:0 is the only card" if count == 1 else f"there are cuda:0 to cuda:{count - 1}"
        raise ModelError(f"device {name} does not exist: {there} (CUDA_VISIBLE_DEVICES can hide others)")
    capability = cards.get_device_capability(index)
    if capability < LOWEST_CAPABILITY:
        raise ModelError(
            f"device {name}: {cards.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; "
            "the kernels need 8.0 (Ampere) or newer; use another card or device cpu"
        )
    return torch.device("cuda", index)


def keep_kernels(directory: str) -> None:
    """Have Triton keep what it compiles in `directory`, for the next start; before a kernel is launched.

    One that cannot be written costs every start its time, not the start itself. "" leaves Triton's own place.
    """
    if not directory:
        return
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if writable:
        os.environ[CACHE_VARIABLE] = directory
    else:
        print(
            "the kernel cache cannot be written, so kernels are compiled at every start; doctor says where it is, and "
            f"{CACHE_VARIABLE} names another place",
            file=sys.stderr,
        )
        os.environ.pop(CACHE_VARIABLE, None)
