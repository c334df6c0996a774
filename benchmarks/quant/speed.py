"""Decode steps of one model in several forms, in turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from aiexport_edge.engine.core.loading import make_runner
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.loader import load_model
from benchmarks.cpu_decode import PAGE_SLACK, WINDOW, make_requests

FORMS: dict[str, dict[str, str]] = {
    "bfloat16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int4 + fp8 KV": {"quantize": "int4", "kv_cache_dtype": "fp8"},
}
# Loads one form in a process of its own: seconds, memory that stays, the most beyond that on the way, and the most
# pages of the files that were mapped at once.
_LOAD = """
import sys, threading, time, json
from pathlib import Path
from aiexport_edge.engine.models.loader import load_model

def resident(*kinds):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(kinds))

OWN = "RssAnon:", "RssShmem:"

import aiexport_edge.kernels.cpu.int4_products
before, files, peak, over = resident(*OWN), resident("RssFile:"), [0, 0], threading.Event()
def watch():
    while not over.wait(0.002):
        peak[:] = max(peak[0], resident(*OWN)), max(peak[1], resident("RssFile:"))
threading.Thread(target=watch, daemon=True).start()
started, cpu = time.perf_counter(), time.process_time()
model = load_model(sys.argv[1], **json.loads(sys.argv[2]))
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
after = resident(*OWN)
over.set()
print(json.dumps({"load_s": round(seconds, 2), "load_cpu_s": round(cpu, 2), "weights_mb": round((after - before) / 1e6),
    "peak_beyond_mb": round((max(peak[0], after) - after) / 1e6), "mapped_peak_mb": round((peak[1] - files) / 1e6)}))
"""


def _runner(directory: Path, options: dict[str, str], threads: int, context: int) -> Runner:
    model = load_model(directory, name="model", context_window=WINDOW, **options)  # type: ignore[arg-type]
    entry = CoreModel("model", str(directory), "auto", WINDOW, False, "")
    pool_bytes = (context + PAGE_SLACK) * model.config.kv_bytes_per_token(model.kv_dtype.itemsize)
    config = CoreConfig([entry], "cpu", 0, pool_bytes, 1, 512, threads, 0.0)
    return make_runner(config, [model], torch.device("cpu"), None)


@torch.inference_mode()
def measure(directory: Path, *, context: int, repeats: int, threads: int) -> list[dict[str, Any]]:
    """A row for each of FORMS: one stream's step in milliseconds, by the clock and of processor time, and how many
    times the first form's tokens a second that is: the median of the ratios of neighbouring steps.
    """
    steps = {}
    for name, options in FORMS.items():
        runner = _runner(directory, options, threads, context)
        plan = StepPlan(
            [ModelPlan(0, [Chunk(request, context, 1, True) for request in make_requests(runner, 1, context)])]
        )
        steps[name] = (runner, plan)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
    for turn in range(repeats + 2):
        for name, (runner, plan) in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            runner.step(plan)
            if turn >= 2:
                times[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    first = times[next(iter(FORMS))]
    rows = []
    for name, measured in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
        wall_gain, cpu_gain = (
            statistics.median(a[which] / b[which] for a, b in zip(first, measured, strict=True)) for which in range(2)
        )
        rows.append(
            {
                "form": name,
                "context": context,
                "threads": threads,
                "step_ms": round(wall, 2),
                "step_cpu_ms": round(cpu, 2),
                "times_bfloat16": round(wall_gain, 2),
                "times_bfloat16_cpu": round(cpu_gain, 2),
            }
        )
    return rows


def measure_loading(directory: Path) -> list[dict[str, Any]]:
    """A row for each form: how long loading takes, and its memory beyond what stays."""
    import json

    rows = []
    largest = max(file.stat().st_size for file in directory.glob("*.safetensors"))
    for name, options in FORMS.items():
        done = subprocess.run(
            [sys.executable, "-c", _LOAD, str(directory), json.dumps(options)],
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append({"form": name} | json.loads(done.stdout) | {"largest_shard_mb": round(largest / 1e6)})
    return rows
