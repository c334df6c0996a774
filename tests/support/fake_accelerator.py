"""An accelerator that is the CPU: graphs run what was captured again, host memory comes poisoned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class FakeAccelerator:
    """Counts captures, replays and marks; `waited` are the marks that were waited for, in that order.

    It says that `free` bytes are free and that trials took `peak`.
    """

    def __init__(self, *, free: int = 1 << 30, peak: int = 1 << 20) -> None:
        self.device = torch.device("cpu")
        self.free, self.peak = free, peak
        self.captures = 0
        self.replays = 0
        self.num_marks = 0
        self.waited: list[int] = []

    def staging(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0x7F, dtype=torch.uint8)  # as an index, it is out of every range

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        run()
        run()

        def replay() -> None:
            self.replays += 1
            run()

        return replay

    def mark(self) -> Callable[[], None]:
        number = self.num_marks
        self.num_marks += 1
        return lambda: self.waited.append(number)

    def free_bytes(self) -> int:
        return self.free

    def peak_bytes(self, run: Callable[[], None]) -> int:
        run()
        return self.peak
