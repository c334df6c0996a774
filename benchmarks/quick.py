"""`make bench`: a short measurement of this machine with the demo model, through every process, as a client sees it.

    python -m benchmarks.quick [--streams 16] [--output FILE.json]

Starts an installation of its own in a temporary directory, measures as `aiexport-edge bench` does, ends it; also says
how long the first start takes. Prints one JSON document with the machine in it: numbers of different machines, or of
one that does other work meanwhile, do not compare.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiexport_edge.shim.cli import machine, measuring
from aiexport_edge.shim.cli.rest_client import parse_server

MODEL = "apex-haiku-4-20250401"
KEY = re.compile(r"axp_live_[A-Za-z0-9_-]{43}")
SECONDS = 12.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running installation, and how long it took to be ready, in seconds."""

    url: str
    key: str
    ready_s: float


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def server() -> Iterator[Server]:
    """`serve` as a first start makes it."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "serve", "--state", f"{folder}/state"]
        command += ["--port", str(port), "--admin-port", str(free_port())]
        log = Path(folder) / "log"
        started = time.perf_counter()
        with (
            log.open("w") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=folder) as process,
        ):
            try:
                assert process.stdout is not None
                key = next((found[0] for line in process.stdout if (found := KEY.search(line))), None)
                if key is None:
                    raise SystemExit(f"serve did not start:\n{log.read_text()}")
                yield Server(f"http://127.0.0.1:{port}", key, time.perf_counter() - started)
            finally:
                process.terminate()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description="Measures this machine.")
    parser.add_argument("--streams", type=int, default=16, help="how many replies at once (default: 16)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the document there too")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine.facts()}
    with server() as running:
        result["ready_s"] = round(running.ready_s, 2)
        result |= measuring.measure(
            parse_server(running.url),
            running.key,
            MODEL,
            streams=args.streams,
            seconds=SECONDS,
            say=lambda line: print(line, file=sys.stderr),
        )
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
