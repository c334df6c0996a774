"""An accelerator that is the CPU: graphs run what was captured again, host memory comes poisoned, streams are noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class FakeAccelerator:
    """Counts captures, replays and marks; `waited` are the marks that were waited for, in that order.

    `events` are replays, marks and what concerns streams, in the order of their launch. It says that `free` bytes are
    free and that trials took `peak`.
    """

    def __init__(self, *, free: int = 1 << 30, peak: int = 1 << 20) -> None:
        self.device = torch.device("cpu")
        self.free, self.peak = free, peak
        self.captures = 0
        self.replays = 0
        self.num_marks = 0
        self.num_reclaimed = 0
        self.waited: list[int] = []
        self.events: list[str] = []
        self.is_beside = False
        self._forked = self._joined = True

    def reserve_staging(self) -> None:
        """There is always memory."""

    def fork(self) -> None:
        assert self._joined, "what ran beside the last step has not been joined"
        self._forked, self._joined = True, False
        self.events.append("fork")

    @contextmanager
    def beside(self) -> Iterator[None]:
        assert self._forked
        assert not self.is_beside
        self.is_beside = True
        self.events.append("beside")
        yield
        self.is_beside = False

    def join(self) -> None:
        self._forked, self._joined = False, True
        self.events.append("join")

    def reclaim(self) -> None:
        self.num_reclaimed += 1

    def staging(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0x7F, dtype=torch.uint8)  # as an index, it is out of every range

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        assert not self.is_beside
        run()
        run()

        def replay() -> None:
            self.replays += 1
            assert not self.is_beside
            self.events.append("replay")
            run()

        return replay

    def mark(self) -> Callable[[], None]:
        number = self.num_marks
        self.num_marks += 1
        assert self._joined, "not everything is behind the mark"
        self.events.append("mark")
        return lambda: self.waited.append(number)

    def free_bytes(self) -> int:
        return self.free

    def peak_bytes(self, run: Callable[[], None]) -> int:
        run()
        return self.peak
