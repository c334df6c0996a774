"""Part f: what the host needs for a step, how long the device waits for it between steps, and whether the host ever
waits for the device where it must not.
"""

from __future__ import annotations

import statistics
import time
import warnings

import torch

from aiexport_edge.engine.core.runner import Runner
from benchmarks.gpu.models import has_room, random_model, runner_of, shapes
from benchmarks.gpu.report import Bench, Value
from benchmarks.gpu.served import Served
from benchmarks.gpu.timing import timing_event

PART = "f"
STEPS = 100


class _Marks:
    """The device's times at the begin and end of each step; none where there is no card."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        if self._bench.device.type == "cuda":
            event = timing_event()
            event.record()
            self._events.append(event)

    def clear(self) -> None:
        """What was before does not count."""
        self._events.clear()

    def idle_share(self) -> float | None:
        """The time between the end of a step and the begin of the next, of all time."""
        if not self._events:
            return None
        self._bench.synchronize()
        gaps = sum(a.elapsed_time(b) for a, b in zip(self._events[1:-1:2], self._events[2::2], strict=True))
        return float(gaps / self._events[0].elapsed_time(self._events[-1]))


def run(bench: Bench) -> None:
    """A row for each model, batch and way to step: each awaited, or overlapping as the core's loop runs them."""
    points = ((2, 20),) if bench.dry_run else ((1, 1024), (32, 1024), (256, 512))
    for name, values in shapes(bench).items():
        longest = max(context for _, context in points) + 4 * STEPS
        model = random_model(values, dtype=torch.bfloat16, device=bench.device, context_window=longest)
        runner = runner_of(
            bench,
            model,
            max_num_running=max(batch for batch, _ in points) + 1,
            max_step_tokens=512 if bench.dry_run else 2048,
            pool_bytes=64 << 20 if bench.dry_run else 0,
        )
        for batch, context in points:
            for overlaps in (False, True):
                way = "overlapping" if overlaps else "awaited"
                if not has_room(runner, batch, context + 4 * STEPS):
                    bench.say(f"f: {name} B{batch}: the pool is too small")
                    continue
                bench.add(PART, f"{name} B{batch} {way}", _measure(bench, runner, batch, context, overlaps=overlaps))
        del runner, model
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(bench: Bench, runner: Runner, batch: int, context: int, *, overlaps: bool) -> dict[str, Value]:
    marks = _Marks(bench)
    served = Served(runner, overlaps=overlaps, mark=marks.mark)
    steps = 3 if bench.dry_run else STEPS
    for row in range(batch):
        served.add([(row + i) % 200 for i in range(context)], max_tokens=4 * STEPS)
    served.prefill()
    for _ in range(2):
        served.advance()
    bench.synchronize()
    marks.clear()
    hosts: list[float] = []
    began = time.perf_counter()
    for _ in range(steps):
        waited, before = served.runner.waited_s, time.perf_counter()
        served.advance()
        hosts.append(time.perf_counter() - before - (served.runner.waited_s - waited))
    seconds = (time.perf_counter() - began) / steps
    idle = marks.idle_share()
    syncs = _hidden_syncs(bench, served)
    served.end()
    return {
        "step_us": seconds * 1e6,
        "host_us": statistics.median(hosts) * 1e6,
        "device_idle_share": idle,
        "hidden_syncs": syncs,
        "ok": None if syncs is None else syncs == 0,
    }


def _hidden_syncs(bench: Bench, served: Served) -> int | None:
    """How often torch waits for the device in a step with a prefill and in two without; the wait for ids is not torch's
    to tell. None without a card."""
    if bench.device.type != "cuda":
        return None
    served.add([i % 200 for i in range(64)], max_tokens=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(3):
                served.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    for message in dict.fromkeys(found):
        bench.say(f"f: {message}")
    return len(found)
