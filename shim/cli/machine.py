"""What a machine can do at best, measured in a second or two without torch: the limits that serving runs into.

Numbers of a machine that does other work meanwhile are lower than its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiexport_edge.shim.cli import card_checks
from aiexport_edge.shim.cli.check import OK

BUFFER = 32 << 20  # bytes; beyond what one core's caches hold
MAX_THREADS = 8
COPY_S = 0.5
FSYNCS = 30
FSYNC_S = 1.0
BLOCK = 4096  # bytes, as a small transaction writes


def facts() -> dict[str, Any]:
    """What the machine is, without measuring: processor, cores, load, Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cards = card_checks.cards() if card_checks.has_card() else ()
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "cards": [check.detail for check in cards if check.status == OK],
    }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limits(state: Path) -> dict[str, Any]:
    """Memory copies, and the disk that `state` is on."""
    return {
        "memory_copy_gb_per_second": round(memory_copy(min(cores(), MAX_THREADS)) / 1e9, 1),
        "disk_free_gib": round(shutil.disk_usage(state).free / 2**30, 1),
        "fsync_ms_p50": round(fsync(state) * 1000, 2),
    }


def memory_copy(threads: int) -> float:
    """Bytes a second that `threads` copy together; each byte is read once and written once."""
    pairs = [(_buffer(), _buffer()) for _ in range(threads)]
    deadline = time.perf_counter() + COPY_S

    def copy(pair: tuple[mmap.mmap, mmap.mmap]) -> int:
        source, target = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in pair)
        copied = 0
        while not copied or time.perf_counter() < deadline:
            ctypes.memmove(target, source, BUFFER)  # without the interpreter's lock
            copied += BUFFER
        return copied

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        copied = sum(pool.map(copy, pairs))
        return copied / (time.perf_counter() - started)


def _buffer() -> mmap.mmap:
    buffer = mmap.mmap(-1, BUFFER)
    for page in range(0, BUFFER, mmap.PAGESIZE):
        buffer[page] = 1  # pages that were never written are all one page of zeros
    return buffer


def fsync(directory: Path) -> float:
    """Seconds, at the median, until a block of 4 KiB that was appended to a file there is durable."""
    took: list[float] = []
    block = os.urandom(BLOCK)
    with tempfile.TemporaryFile(dir=directory) as file:
        deadline = time.perf_counter() + FSYNC_S
        while not took or (len(took) < FSYNCS and time.perf_counter() < deadline):
            started = time.perf_counter()
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
            took.append(time.perf_counter() - started)
    return statistics.median(took)
