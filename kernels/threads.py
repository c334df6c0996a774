"""Threads for the operations on a CPU: torch's for products, a few of our own for the kernels in `kernels.cpu`.

The two never run at the same time, since both work only while the one thread that launches operations waits for them.
Any thread may launch, but one at a time keeps the number of busy threads at what was set. Our helpers sleep in between;
torch's spin for milliseconds unless told not to, which starves every other process on a small machine: a process that
runs operations should be started with `ENVIRONMENT` (it is read when torch is loaded).
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}

# Waking a helper takes 20 to 60 µs: a kernel that takes less than this stays on its thread.
MIN_SHARED_NANOSECONDS = 150_000.0

Kernel = Callable[..., None]


class _Team:
    """The threads that help the launching one. They share a queue of (kernel, arguments)."""

    def __init__(self, num_helpers: int) -> None:
        self.num_helpers = num_helpers
        self._jobs: queue.SimpleQueue[tuple[Kernel, tuple[Any, ...]] | None] = queue.SimpleQueue()
        for number in range(num_helpers):
            threading.Thread(target=self._help, name=f"kernel-{number + 1}", daemon=True).start()

    def call(self, num_helpers: int, kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        for _ in range(num_helpers):
            self._jobs.put((kernel, arguments))

    def dismiss(self) -> None:
        for _ in range(self.num_helpers):
            self._jobs.put(None)

    def _help(self) -> None:
        while (job := self._jobs.get()) is not None:
            kernel, arguments = job
            kernel(*arguments)
            del job, kernel, arguments  # hold no tensors while asleep


_team: _Team | None = None


def set_num_threads(num_threads: int) -> None:
    """Let torch's products and our kernels use this many threads each, the launching one included."""
    global _team
    import torch

    torch.set_num_threads(num_threads)
    if _team is not None:
        _team.dismiss()
    _team = _Team(num_threads - 1)


def num_threads() -> int:
    """How many threads a kernel may use; torch's number unless `set_num_threads` was called."""
    global _team
    if _team is None:
        import torch

        _team = _Team(torch.get_num_threads() - 1)
    return _team.num_helpers + 1


def launch(kernel: Kernel, num_units: int, nanoseconds: float, *arguments: Any) -> None:
    """Run `kernel(control, num_units, *arguments)` on this thread, and on helpers too where it takes long enough.

    Every thread that runs the kernel takes the next unit from control[0] until there is none; control[1] counts the
    threads at work. So a helper that wakes too late finds nothing left to do, and touches no memory but `control`.
    `nanoseconds` is an estimate for one thread.
    """
    control = np.zeros(2, np.int64)
    if nanoseconds < MIN_SHARED_NANOSECONDS or num_units == 1 or num_threads() == 1:
        kernel(control, num_units, *arguments)
        return
    assert _team is not None
    _team.call(min(_team.num_helpers, num_units - 1), kernel, (control, num_units, *arguments))
    kernel(control, num_units, *arguments)
    while control[1] != 0:
        time.sleep(20e-6)  # lets go of the GIL, which a helper needs to come to an end
