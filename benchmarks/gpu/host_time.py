"""Part f: what the host needs for a step, and how long the device waits for it between steps."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.gpu.models import has_room, random_model, runner_of, shapes
from benchmarks.gpu.report import Bench, Value
from benchmarks.gpu.sequences import Sequences
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

    def idle_share(self) -> float | None:
        """The time between the end of a step and the begin of the next, of all time."""
        if not self._events:
            return None
        self._bench.synchronize()
        gaps = sum(a.elapsed_time(b) for a, b in zip(self._events[1:-1:2], self._events[2::2], strict=True))
        return float(gaps / self._events[0].elapsed_time(self._events[-1]))


def run(bench: Bench) -> None:
    """A row for each model, batch and way to step: each awaited, or launched one ahead."""
    points = ((2, 20),) if bench.dry_run else ((1, 1024), (32, 1024), (256, 512))
    for name, values in shapes(bench).items():
        longest = max(context for _, context in points) + 4 * STEPS
        model = random_model(values, dtype=torch.bfloat16, device=bench.device, context_window=longest)
        runner = runner_of(
            bench,
            model,
            max_num_running=max(batch for batch, _ in points),
            max_step_tokens=512,
            pool_bytes=64 << 20 if bench.dry_run else 0,
        )
        for batch, context in points:
            for ahead in (False, True):
                way = "ahead" if ahead else "awaited"
                if not has_room(runner, batch, context + 2 * STEPS):
                    bench.say(f"f: {name} B{batch}: the pool is too small")
                    continue
                row = _measure(bench, Sequences(runner), batch, context, model.config.vocab_size, ahead=ahead)
                bench.add(PART, f"{name} B{batch} {way}", row)
        del runner, model
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(
    bench: Bench, sequences: Sequences, batch: int, context: int, vocabulary: int, *, ahead: bool
) -> dict[str, Value]:
    tokens = [i % vocabulary for i in range(context)]
    requests = [sequences.add(tokens, computed=context - 1) for _ in range(batch)]
    runner = sequences.runner
    sequences.step(requests)
    marks, launches = _Marks(bench), []
    pending = None
    bench.synchronize()
    began = time.perf_counter()
    steps = 3 if bench.dry_run else STEPS
    for _ in range(steps):
        plan = sequences.plan(requests)
        marks.mark()
        before = time.perf_counter()
        launched = runner.launch(plan)
        launches.append(time.perf_counter() - before)
        marks.mark()
        if pending is not None:
            sequences.settle(requests, pending)
        sequences.advance(requests)
        pending = launched
        if not ahead:
            sequences.settle(requests, launched)
            pending = None
    if pending is not None:
        sequences.settle(requests, pending)
    seconds = (time.perf_counter() - began) / steps
    return {
        "step_us": seconds * 1e6,
        "host_launch_us": statistics.median(launches) * 1e6,
        "device_idle_share": marks.idle_share(),
    }
