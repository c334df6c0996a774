"""Servers on one model, one after the other, with the same requests: `python -m benchmarks.peers MODEL_DIRECTORY`.

    --server NAME            one of them, may be repeated (default: all that are installed here)
    --output FILE            results, kept after every cell: what is in it already is not measured again
    --budget SECONDS         for the cells of one server; cells beyond are left out and said to be

Where the peers are comes from the environment: PEERS_VLLM and PEERS_TRANSFORMERS (virtual environments),
PEERS_LLAMA_SERVER (binary), PEERS_GGUF (the model by `to_gguf.py`), PEERS_PRELOAD (tcmalloc and libiomp, for which
vLLM's guide asks). A server that is not there is left out. `model.py` makes the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import machine
from benchmarks.peers.cells import CELLS, Cell, first_token_s, measure
from benchmarks.peers.prompts import Prompts, make_counter
from benchmarks.peers.servers import SERVERS, START_S, Server
from benchmarks.peers.table import print_tables

NEEDED = {
    "vllm": ("PEERS_VLLM",),
    "transformers": ("PEERS_TRANSFORMERS",),
    "llama.cpp": ("PEERS_LLAMA_SERVER", "PEERS_GGUF"),
}
NOISY = 0.05  # share of the machine that others use: said beside the figures


class Results:
    """One JSON document, written after every change."""

    def __init__(self, path: Path, model: Path) -> None:
        self.path = path
        about: dict[str, Any] = {"machine": machine.describe(), "commit": machine.commit(), "model": model.name}
        self.document = about | {"servers": {}}
        if path.exists():
            self.document["servers"] = json.loads(path.read_text())["servers"]
        self.document["load_average"] = [round(value, 2) for value in os.getloadavg()]
        self.document["date"] = time.strftime("%Y-%m-%d")

    def of(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.document["servers"].setdefault(name, {"cells": {}})
        return found

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.document, indent=1) + "\n")


async def run_server(server: Server, results: Results, prompts: Prompts, cells: list[Cell], budget_s: float) -> None:
    """Start it, measure what is missing, stop it."""
    found = results.of(server.name)
    missing = [cell for cell in cells if cell.key not in found["cells"]]
    if not missing:
        print(f"{server.name}: nothing to do")
        return
    server.start()
    try:
        cold = await first_token_s(server, prompts.text(128), START_S)
        print(f"{server.name}: first token {cold:.2f} s after the start", flush=True)
        found["cold_start_s"] = round(cold, 2)
        found["settings"] = server.settings()
        found["install_mib"] = server.install_bytes() >> 20
        end = time.perf_counter() + budget_s
        for cell in missing:
            if time.perf_counter() > end:
                print(f"{server.name}: {cell.key}: left out, over its time", flush=True)
                continue
            figures = await asyncio.wait_for(measure(server, cell, prompts), budget_s)
            found["cells"][cell.key] = figures
            found["memory_mib"] = max(found.get("memory_mib", 0), machine.pss_bytes(server.pid) >> 20)
            found["processes"] = machine.num_processes(server.pid)
            results.write()
            noise = figures["others_cpu_share"]
            note = f"  others used {noise:.0%} of the machine" if noise > NOISY else ""
            print(
                f"{server.name}: {cell.key}: {figures['tokens_per_s']} tokens/s, first token "
                f"{figures['first_token_p50_ms']:.0f} ms, gaps {figures['gap_p50_ms']:.1f} ms{note}",
                flush=True,
            )
    except (TimeoutError, RuntimeError) as error:
        print(f"{server.name}: {error or 'over its time'}", flush=True)
        found["failed"] = str(error)[-500:] or "over its time"
    finally:
        server.stop()
        results.write()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Servers compared on one machine.")
    parser.add_argument("model", type=Path, help="made by python -m benchmarks.peers.model")
    parser.add_argument("--server", action="append", choices=sorted(SERVERS), help="default: all that are here")
    parser.add_argument("--cell", action="append", choices=[cell.key for cell in CELLS], help="default: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--budget", type=float, default=300.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/peers.json"))
    parser.add_argument("--keep", type=Path, help="a directory for the servers' logs")
    options = parser.parse_args()
    here = [name for name in SERVERS if all(os.environ.get(variable) for variable in NEEDED.get(name, ()))]
    results = Results(options.output, options.model)
    cells = [cell for cell in CELLS if not options.cell or cell.key in options.cell]
    count = make_counter(options.model)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.server or here:
            place = options.keep or Path(folder)
            place.mkdir(parents=True, exist_ok=True)
            server = SERVERS[name](options.model.resolve(), place.resolve(), options.threads)
            asyncio.run(run_server(server, results, Prompts(count, seed=1), cells, options.budget))
    print_tables(results.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
