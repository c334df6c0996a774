"""Threads for the operations on a CPU: torch's for products, a few of our own for the kernels in `kernels.cpu`.

The two never run at the same time, since both work only while the one thread that launches operations waits for them.
Any thread may launch, but one at a time keeps the number of busy threads at what was set. Our helpers sleep in between;
torch's spin for milliseconds unless told not to, which starves every other process on a small machine: a process that
runs operations should be started with `ENVIRONMENT` (it is read when torch is loaded).
"""

from __future__ import annotations

import ctypes
import queue
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}

# Waking a helper takes 20 to 60 µs: a kernel that takes less than this stays on its thread.
MIN_SHARED_NANOSECONDS = 150_000.0

Kernel = Callable[..., None]
_Control = ctypes.c_int64 * 2  # the next unit, the number of threads at work
_CACHE_LINE = 64


@dataclass(frozen=True, slots=True)
class _Job:
    """One launch, for all threads that take part."""

    kernel: Kernel
    control: ctypes.Array[ctypes.c_int64]
    scratch_bytes: int
    num_units: int
    arguments: tuple[Any, ...]

    def run(self) -> None:
        scratch = _thread.scratch(self.scratch_bytes)
        self.kernel(ctypes.addressof(self.control), scratch, self.num_units, *self.arguments)


class _Thread(threading.local):
    """What each thread keeps from launch to launch: memory for its kernels, as much as the largest wanted."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(0)

    def scratch(self, num_bytes: int) -> int:
        """Address of that much memory, at a cache line."""
        if len(self._memory) < num_bytes + _CACHE_LINE:
            self._memory = ctypes.create_string_buffer(num_bytes + _CACHE_LINE)
        return -(-ctypes.addressof(self._memory) // _CACHE_LINE) * _CACHE_LINE


class _Team:
    """The threads that help the launching one, with one queue for all."""

    def __init__(self, num_helpers: int) -> None:
        self.num_helpers = num_helpers
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        for number in range(num_helpers):
            threading.Thread(target=self._help, name=f"kernel-{number + 1}", daemon=True).start()

    def call(self, num_helpers: int, run: Callable[[], None]) -> None:
        for _ in range(num_helpers):
            self._jobs.put(run)

    def dismiss(self) -> None:
        for _ in range(self.num_helpers):
            self._jobs.put(None)

    def _help(self) -> None:
        while (run := self._jobs.get()) is not None:
            run()


class Recorder(Protocol):
    """Takes launches down instead of running them (`kernels.cpu.program`)."""

    def add(
        self,
        kernel: Kernel,
        num_units: int,
        units_at: int,
        nanoseconds: float,
        scratch_bytes: int,
        arguments: Sequence[int],
    ) -> None: ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...


_thread = _Thread()
_team: _Team | None = None
_recorder: Recorder | None = None


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


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within the block every launch goes to `recorder`, and so does memory for results."""
    global _recorder
    assert _recorder is None
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def is_recording() -> bool:
    """Whether launches are being taken down: operations that are none of ours would not be."""
    return _recorder is not None


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for an operation's result: torch's, or the recorder's."""
    if _recorder is not None:
        return _recorder.empty(shape, dtype)
    import torch

    return torch.empty(shape, dtype=dtype)


@contextmanager
def sharing(nanoseconds: float) -> Iterator[None]:
    """Around operations of torch's, with an estimate of the time that one thread needs: they stay on this thread where
    that is not worth waking others. torch itself wakes all for products of a few rows; then a thread of another process
    that has a processor holds up each of them.
    """
    import torch

    if nanoseconds >= MIN_SHARED_NANOSECONDS:
        yield
        return
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def float_bits(value: float) -> int:
    """A float64 as kernels take it, as an int64 of the same bits: all their parameters are of one kind."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def scratch(num_bytes: int) -> int:
    """The address of that much memory of this thread's own; the same memory at every call."""
    return _thread.scratch(num_bytes)


def call_helpers(run: Callable[[], None]) -> None:
    """Let every helper call `run` once, as soon as it can."""
    if num_threads() > 1:
        assert _team is not None
        _team.call(_team.num_helpers, run)


def launch(
    kernel: Kernel, num_units: int, nanoseconds: float, scratch_bytes: int, *arguments: int, units_at: int = 0
) -> None:
    """Run `kernel(control, scratch, num_units, *arguments)` here, and on helpers too where it takes long enough.

    `control` and `scratch` are addresses. Every thread takes the next unit from the first int64 of `control` until none
    is left; the second counts the threads at work. So a helper that wakes too late finds nothing to do, and touches no
    memory but `control`. `scratch` is the thread's own. `nanoseconds` is an estimate of the time one thread needs. With
    `units_at`, the number of units is the int64 at that address when the kernel begins.
    """
    if _recorder is not None:
        _recorder.add(kernel, num_units, units_at, nanoseconds, scratch_bytes, arguments)
        return
    if units_at:
        num_units = ctypes.c_int64.from_address(units_at).value
    job = _Job(kernel, _Control(), scratch_bytes, num_units, arguments)
    if nanoseconds >= MIN_SHARED_NANOSECONDS and num_units > 1 and num_threads() > 1:
        assert _team is not None
        _team.call(min(_team.num_helpers, num_units - 1), job.run)
    job.run()
    while job.control[1] != 0:
        time.sleep(20e-6)  # lets go of the GIL, which a helper needs to come to an end
