"""`python -m benchmarks.quant`: error against bfloat16 on trained weights, and speed where a model is named.

    python -m benchmarks.quant [--models DIRECTORY ...] [--speed DIRECTORY] [--output FILE.json]

Error: logit divergence and greedy agreement of every form on the demo model and stories260K (`AIEXPORT_TEST_DATA`).
Speed: decode steps at one stream and loading, for a model of real shapes (`benchmarks.peers.model` writes one).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from aiexport_edge.kernels import threads

os.environ.update(threads.ENVIRONMENT)  # before torch is loaded

from benchmarks.peers.machine import commit, describe
from benchmarks.quant import error, speed

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "engine" / "demo" / "model"


def trained_models() -> list[Path]:
    """Those that are there."""
    data = Path(os.environ.get("AIEXPORT_TEST_DATA", ROOT.parent / "shared" / "data"))
    stories = data / "models" / "stories260K"
    return [DEMO, *([stories] if stories.is_dir() else [])]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows under one another."""
    names = list(rows[0])
    cells = [names, *[[str(row[name]) for name in names] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quant", description="Weights, keys, values in few bits."
    )
    parser.add_argument("--models", type=Path, nargs="*", help="trained models (default: the demo's, stories260K)")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text (default %(default)s)")
    parser.add_argument("--greedy", type=int, default=48, help="tokens to go on with (default %(default)s)")
    parser.add_argument("--speed", type=Path, help="a model of real shapes")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = {"machine": describe(), "commit": commit()}
    threads.set_num_threads(options.threads)
    models = trained_models() if options.models is None else options.models
    for directory in models:
        rows = error.measure(directory, number=options.texts, length=options.length, num_greedy=options.greedy)
        document.setdefault("error", []).extend(rows)
        print(table(rows), end="\n\n", flush=True)
    if options.speed is not None:
        document["speed"] = speed.measure(
            options.speed, context=options.context, repeats=options.repeats, threads=options.threads
        )
        print(table(document["speed"]), end="\n\n", flush=True)
        document["loading"] = speed.measure_loading(options.speed)
        print(table(document["loading"]), flush=True)
        document["load_average"] = [round(value, 2) for value in os.getloadavg()]
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
