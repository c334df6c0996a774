"""Part e: from the start of a process to its first token: cold (kernels compiled) and warm (Triton's cache there).

`python -m benchmarks.gpu.start DIRECTORY DEVICE` is that process: it loads as the core does, and draws one token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import shapes
from benchmarks.gpu.report import ROOT, Bench

PART = "e"
PROMPT = 100


def run(bench: Bench) -> None:
    """A row for each model. The files are in the page cache, having just been written."""
    for name, values in shapes(bench).items():
        if name == "Qwen3-4B":
            continue  # between the other two
        with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory() as cache:
            bench.say(f"e: writing {name}")
            write_random(Path(directory), values, bench.device)
            for temperature in ("cold", "warm"):
                row = _start(bench, Path(directory), cache)
                bench.add(PART, f"{name} {temperature}", row)


def write_random(directory: Path, values: dict[str, Any], device: torch.device) -> None:
    """A Hugging Face directory of this config.json: a file a layer, an index, random bfloat16 weights, drawn on
    `device`."""
    from safetensors.torch import save_file

    from aiexport_edge.engine.models.config import ModelConfig
    from aiexport_edge.engine.models.tensor_names import expected_shapes

    (directory / "config.json").write_text(json.dumps(values))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(ModelConfig.load(directory)).items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = shape
    weight_map = {}
    for file, tensors in files.items():
        made = {}
        for name, shape in tensors.items():
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
            made[name] = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=scale).cpu()
            weight_map[name] = file
        save_file(made, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _start(bench: Bench, directory: Path, cache: str) -> dict[str, float]:
    """Seconds until imports, weights and the first token were there, from the start of the process."""
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.start", str(directory), str(bench.device)],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the process that was to start has failed:\n{done.stderr}")
    return {f"{what}_s": at - began for what, at in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    """The process that is timed."""
    directory, device = sys.argv[1:]
    from aiexport_edge.engine.core.loading import load
    from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel
    from benchmarks.gpu.served import Served

    times = {"imports": time.time()}
    on_card = device.startswith("cuda")
    dtype = "bfloat16" if on_card else "auto"
    model = CoreModel("model", directory, dtype, 0, False, "")
    pool_bytes = 0 if on_card else 64 << 20
    runner = load(CoreConfig([model], device, 0, pool_bytes, 64, 0, 0, 0.0))
    times["ready"] = time.time()
    served = Served(runner)
    served.add([i % 200 for i in range(PROMPT)], max_tokens=8)
    served.prefill()
    times["first_token"] = time.time()
    served.end()
    print(json.dumps(times))


if __name__ == "__main__":
    main()
