"""Proves and measures the engine on an NVIDIA card: `python -m benchmarks.gpu [--part a --part d]`.

Parts: a kernels against their references, b families against transformers, c kernel speed, d whole models against the
roofline, e process start to first token, f host time and idle gaps, g a whole installation under load, h mixtures of
experts, i vision towers, j drafts, l adapters. Progress goes to stderr, a table to stdout at the end, the result with
card, driver, versions and commit to a JSON file in benchmarks/results. Exit status 1 when something is wrong, 2 when it
cannot run. `--dry-run` runs tiny shapes on the CPU: that the program itself works.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path

import torch

from aiexport_edge.engine.core.accelerator import exact_float32
from aiexport_edge.engine.core.device import select_device
from aiexport_edge.engine.models.config import ModelError
from benchmarks.gpu.report import Bench, result_file

PARTS = {
    "a": "correctness",
    "b": "families",
    "c": "kernel_speed",
    "d": "end_to_end",
    "e": "start",
    "f": "host_time",
    "g": "load",
    "h": "mixtures",
    "i": "vision",
    "j": "drafts",
    "l": "adapters",
}


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", action="append", choices=sorted(PARTS), help="a part to run (default: all)")
    parser.add_argument("--device", default="cuda:0", help="the card (default: cuda:0)")
    parser.add_argument("--output", type=Path, help="where the JSON result goes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    arguments = parser.parse_args(argv)
    try:
        device = select_device("cpu" if arguments.dry_run else arguments.device)
    except ModelError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    if device.type != "cuda" and not arguments.dry_run:
        print("benchmarks.gpu: an NVIDIA card is needed; --dry-run tries the program without one", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
        exact_float32()  # also what is compared with
    bench = Bench(device, arguments.dry_run)
    output = arguments.output or result_file(device, datetime.now(UTC))
    for part in arguments.part or sorted(PARTS):
        bench.say(f"part {part}: {PARTS[part]}")
        try:
            with torch.inference_mode():
                importlib.import_module(f"benchmarks.gpu.{PARTS[part]}").run(bench)
        except Exception as error:  # the other parts are worth having, and the row says what this one met
            traceback.print_exc()
            bench.add(part, "failed", {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]})
        bench.write(output)  # after each part, so that a killed run leaves what it has
    print(bench.table())
    print(f"result: {output}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
