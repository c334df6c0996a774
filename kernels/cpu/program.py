"""Launches that were recorded once and are run again at one blow: what a graph is on a GPU, for decodes on a CPU.

A decode at one row is hundreds of operations of a few microseconds, and Python takes as long for each. A `Program`
keeps their kernels and arguments in one block of memory; `run_records` goes through it without Python:

    launching thread  | record 0 | record 1, shared | record 2 | …     publishes each shared record as it begins it
    helper threads    |   spin   |  its units too   |   spin   | …     come along, late or not at all: never waited for

A helper that comes late finds that the record is over and touches nothing but its counters: it first says that it is a
guest of the record, then looks whether that is still open. What operations allocate while they are recorded lies in an
`Arena`, which all programs of a model share, since they never run at the same time.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]

from aiexport_edge.kernels import threads
from aiexport_edge.kernels.cpu import building, memory, simd
from aiexport_edge.kernels.cpu.jit import address_of, inner, kernel
from aiexport_edge.kernels.cpu.memory import fetch_add, get_int64, set_int64
from aiexport_edge.kernels.cpu.simd import I32, I64, int64, none, operation

# A record: kernel, number of its arguments, units or the address of their number, whether it is an address, whether
# helpers take part, the helpers that are there, the kernel's two counters, arguments.
KERNEL, NUM_ARGUMENTS, UNITS, IS_ADDRESS, IS_SHARED, GUESTS, CONTROL, ARGUMENTS = 0, 1, 2, 3, 4, 5, 6, 8
MOST_ARGUMENTS = 48
RECORD_SIZE = ARGUMENTS + MOST_ARGUMENTS
# The head of a program: the shared record that is begun (from 1), the helpers that are in it, the end for helpers.
CURRENT, INSIDE = 0, 1
HEAD_SIZE = 8
NOTHING, OVER = 0, -1

SPINS = 4000  # pauses, some 40 µs: then a waiting thread lets others run in between
MIN_SHARED_NANOSECONDS = 8_000.0  # helpers are awake already
MIN_WAKING_NANOSECONDS = 1_000_000.0  # of all shared records: a shorter program runs on its thread alone
ALIGNMENT = 64  # bytes

_POINTER = ir.PointerType(ir.IntType(8))


@operation(none, int64, int64, int64, int64, int64, int64)
def _call(
    builder: Any, kernel: Any, num_arguments: Any, control: Any, scratch: Any, num_units: Any, arguments: Any
) -> None:
    """Call a compiled kernel by its address. numba's convention: places for result and exception, then parameters."""
    result = building.alloca_once(builder, _POINTER)
    exception = building.alloca_once(builder, _POINTER)
    done = builder.append_basic_block("called")
    unknown = builder.append_basic_block("unknown")
    switch = builder.switch(num_arguments, unknown)
    for number in range(1, MOST_ARGUMENTS + 1):
        block = builder.append_basic_block(f"arguments.{number}")
        switch.add_case(ir.Constant(I64, number), block)
        builder.position_at_end(block)
        values = [
            builder.load(memory.pointer(builder, arguments, I64, ir.Constant(I64, i)), align=8, typ=I64)
            for i in range(number)
        ]
        form = ir.FunctionType(I32, [result.type, exception.type] + [I64] * (3 + number))
        function = builder.inttoptr(kernel, form.as_pointer())
        builder.call(function, [result, exception, control, scratch, num_units, *values])
        builder.branch(done)
    builder.position_at_end(unknown)
    builder.branch(done)
    builder.position_at_end(done)


@operation(none)
def _pause(builder: Any) -> None:
    """Tell the processor that this is a loop that waits."""
    if simd.IS_X86:
        simd.call(builder, "llvm.x86.sse2.pause", ir.VoidType())


@operation(none)
def _yield(builder: Any) -> None:
    """Let another process have this processor, if one wants it."""
    simd.call(builder, "sched_yield", I32)


@operation(int64, int64, int64)
def _peek(builder: Any, address: Any, index: Any) -> Any:
    """Item `index` of an int64 array that another thread writes."""
    return builder.load_atomic(memory.pointer(builder, address, I64, index), "acquire", 8, typ=I64)


@inner
def _rest(spins: int) -> int:
    """One turn of waiting; the number of turns."""
    if spins < SPINS:
        _pause()
    else:
        _yield()
    return spins + 1


@inner
def _run_record(record: int, scratch: int) -> None:
    units = get_int64(record, UNITS)
    if get_int64(record, IS_ADDRESS) != 0:
        units = get_int64(units, 0)
    arguments, control = record + 8 * ARGUMENTS, record + 8 * CONTROL
    _call(get_int64(record, KERNEL), get_int64(record, NUM_ARGUMENTS), control, scratch, units, arguments)


@operation(none, int64, int64)
def _publish(builder: Any, head: Any, number: Any) -> None:
    """Say which record has begun, before anything that comes after is read or written."""
    place = memory.pointer(builder, head, I64, ir.Constant(I64, CURRENT))
    builder.atomic_rmw("xchg", place, number, "seq_cst")


@kernel
def open_records(head: int, records: int, num_records: int) -> None:
    """Make ready for a run: from now on helpers may come in. Those of the run before leave first."""
    spins = 0
    while _peek(head, INSIDE) != 0:
        spins = _rest(spins)
    for number in range(num_records):
        record = records + 8 * number * RECORD_SIZE
        set_int64(record, GUESTS, 0)
        set_int64(record, CONTROL, 0)
        set_int64(record, CONTROL + 1, 0)
    _publish(head, NOTHING)


@kernel
def run_records(head: int, records: int, num_records: int, scratch: int) -> None:
    """Every record in turn, on the launching thread."""
    for number in range(num_records):
        record = records + 8 * number * RECORD_SIZE
        shared = get_int64(record, IS_SHARED)
        if shared != 0:
            _publish(head, number + 1)
        _run_record(record, scratch)
        if shared != 0:
            _publish(head, NOTHING)  # from now on nobody comes in: what the record reads may change
            spins = 0
            while _peek(record, GUESTS) != 0:
                spins = _rest(spins)
    _publish(head, OVER)


@kernel
def follow_records(head: int, records: int, scratch: int) -> None:
    """Help with shared records until the run is over; if it is, nothing."""
    fetch_add(head, INSIDE, 1)
    last, spins = NOTHING, 0
    while True:
        current = _peek(head, CURRENT)
        if current == OVER:
            break
        if current == last:
            spins = _rest(spins)
            continue
        last, spins = current, 0
        if current == NOTHING:
            continue
        record = records + 8 * (current - 1) * RECORD_SIZE
        fetch_add(record, GUESTS, 1)
        if _peek(head, CURRENT) == current:
            _run_record(record, scratch)
        fetch_add(record, GUESTS, -1)
    fetch_add(head, INSIDE, -1)


class Arena:
    """Memory for what recorded operations allocate: given out by address, taken back when a tensor dies.

    The system backs what is written only, so it may be far larger than what is needed.
    """

    def __init__(self, num_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, num_bytes, flags=flags)
        self._free = [(0, num_bytes)]  # (first, size), ascending, no two adjacent

        self._begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with whatever is there. Raises MemoryError where the arena is too small."""
        count = math.prod(shape)
        size = -(-max(1, count * dtype.itemsize) // ALIGNMENT) * ALIGNMENT
        first = self._take(size)
        # torch holds on to the buffer for as long as a tensor, or a view of it, is left.
        buffer = (ctypes.c_char * size).from_buffer(self._memory, first)
        weakref.finalize(buffer, self._give_back, first, size)
        return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)[:count].view(*shape)

    def view(self, address: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What lies at the address of an earlier tensor, whoever it has been given to meanwhile."""
        first, count = address - self._begin, math.prod(shape)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=first).view(*shape)

    def _take(self, size: int) -> int:
        for place, (first, free) in enumerate(self._free):
            if free >= size:
                self._free[place : place + 1] = [(first + size, free - size)] if free > size else []
                return first
        raise MemoryError(f"an arena has no {size} bytes in one piece")

    def _give_back(self, first: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for piece in sorted([*self._free, (first, size)]):
            if merged and sum(merged[-1]) == piece[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + piece[1])
            else:
                merged.append(piece)
        self._free = merged


class Program:
    """What was launched within `recording`, in that order. `run` does it again, on what the tensors hold then."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._rows: list[list[int]] = []
        self._scratch_bytes = 0
        self._head = np.zeros(HEAD_SIZE, dtype=np.int64)
        self._records = np.zeros((0, RECORD_SIZE), dtype=np.int64)
        self._shared_nanoseconds = 0.0
        self._shares = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Launches of this block are kept and not run; what operations allocate comes from the arena."""
        with threads.recording(self):
            yield
        self._records = np.array(self._rows, dtype=np.int64).reshape(-1, RECORD_SIZE)
        self._shares = self._shared_nanoseconds >= MIN_WAKING_NANOSECONDS

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """See `threads.Recorder`."""
        return self._arena.empty(shape, dtype)

    def add(
        self,
        kernel: Callable[..., None],
        num_units: int,
        units_at: int,
        nanoseconds: float,
        scratch_bytes: int,
        arguments: Sequence[int],
    ) -> None:
        """See `threads.Recorder`."""
        assert len(arguments) <= MOST_ARGUMENTS
        several = threads.num_threads() > 1 and (units_at != 0 or num_units > 1)
        shared = several and nanoseconds >= MIN_SHARED_NANOSECONDS
        self._shared_nanoseconds += nanoseconds if shared else 0.0
        units = [units_at, 1] if units_at else [num_units, 0]
        row = [address_of(kernel), len(arguments), *units, int(shared), 0, 0, 0, *map(int, arguments)]
        self._rows.append(row + [0] * (RECORD_SIZE - len(row)))
        self._scratch_bytes = max(self._scratch_bytes, scratch_bytes)

    def run(self) -> None:
        """All of it; blocks until it is done."""
        head, records = self._head.ctypes.data, self._records.ctypes.data
        open_records(head, records, len(self._records))
        if self._shares:
            threads.call_helpers(self._follow)
        run_records(head, records, len(self._records), threads.scratch(self._scratch_bytes))

    def _follow(self) -> None:
        scratch = threads.scratch(self._scratch_bytes)
        follow_records(self._head.ctypes.data, self._records.ctypes.data, scratch)
