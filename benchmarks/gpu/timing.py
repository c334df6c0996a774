"""How long the device takes: by CUDA events on a card, by the clock elsewhere. And what the card can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.report import Bench

FLUSH_BYTES = 256 << 20  # larger than any card's second-level cache


def seconds_of(bench: Bench, run: Callable[[], object], *, repeats: int = 20, cold: bool = True) -> float:
    """The median time of `run` on the device. `cold`: the cache is emptied before each."""
    run()
    if bench.device.type != "cuda":
        times = []
        for _ in range(2):
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
        return statistics.median(times)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=bench.device) if cold else None
    events = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        torch.cuda._sleep(2_000_000)  # type: ignore[no-untyped-call]  # the host gets ahead, so that launches are not what is measured
        begin, end = timing_event(), timing_event()
        begin.record()
        run()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(bench.device)
    return float(statistics.median(begin.elapsed_time(end) for begin, end in events)) / 1000


def timing_event() -> torch.cuda.Event:
    """An event of the current stream that remembers when it happened."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_bandwidth(bench: Bench) -> float:
    """Bytes a second that a large copy within the device's memory reads and writes."""
    size = 1 << 20 if bench.dry_run else 1 << 30
    source = torch.empty(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(bench, lambda: target.copy_(source), cold=False)


def matmul_rate(bench: Bench, dtype: torch.dtype) -> float:
    """Operations a second of a large square product."""
    size = 128 if bench.dry_run else 8192
    a = torch.randn(size, size, device=bench.device).to(dtype)
    return 2 * size**3 / seconds_of(bench, lambda: a @ a, cold=False)
