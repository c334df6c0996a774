"""Cold start to the first token: `python -m benchmarks.startup [--model DIRECTORY] [--repeats 5]`.

From the spawn of `serve` with a fresh state directory to the first text of a reply whose request is sent as soon as one
is taken. The model's files are in the system's page cache. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.cells import first_token_s
from benchmarks.peers.machine import commit, describe, pss_bytes
from benchmarks.peers.servers import Ours

DEMO = Path(__file__).resolve().parents[1] / "engine" / "demo" / "model"
PATIENCE_S = 120.0


def start_once(model: Path, threads: int) -> dict[str, Any]:
    """Seconds to the first token, and memory then."""
    with tempfile.TemporaryDirectory() as folder:
        server = Ours(model, Path(folder), threads)
        server.start()
        try:
            first = asyncio.run(first_token_s(server, "Hello!", PATIENCE_S))
            return {"first_token_s": round(first, 2), "memory_mib": pss_bytes(server.pid) >> 20}
        finally:
            server.stop()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description="Cold start to first token.")
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=describe()["cores"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    runs = [start_once(options.model.resolve(), options.threads) for _ in range(options.repeats)]
    firsts = [run["first_token_s"] for run in runs]
    document = {
        "machine": describe(),
        "commit": commit(),
        "model": "demo" if options.model == DEMO else options.model.name,
        "first_token_s_p50": statistics.median(firsts),
        "first_token_s": firsts,
        "memory_mib": max(run["memory_mib"] for run in runs),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
