"""`make bench`: a short measurement of this machine with the demo model, through every process, as a client sees it.

    python -m benchmarks.quick [--streams 16] [--output FILE.json]

Starts an installation of its own in a temporary directory, measures, ends it. Prints one JSON document with the machine
in it: numbers of different machines, or of one that does other work meanwhile, do not compare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

MODEL = "apex-haiku-4-20250401"
KEY = re.compile(r"axp_live_[A-Za-z0-9_-]{43}")


@dataclass(frozen=True, slots=True)
class Server:
    """A running installation, and how long it took to be ready, in seconds."""

    url: str
    key: str
    ready_s: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One streamed reply. Seconds from the request; tokens as its usage says."""

    first_text_s: float
    total_s: float
    output_tokens: int


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


async def one(client: httpx.AsyncClient, prompt: str, max_tokens: int) -> Timing:
    body = {"model": MODEL, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}]}
    started = time.perf_counter()
    first, tokens = 0.0, 0
    async with client.stream("POST", "/v2/messages/stream", json=body) as reply:
        if reply.status_code != 200:
            raise SystemExit(f"status {reply.status_code}: {(await reply.aread()).decode()}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["type"] == "content_block_delta" and not first:
                first = time.perf_counter() - started
            elif event["type"] == "message_delta":
                tokens = event["usage"]["output_tokens"]
            elif event["type"] == "error":
                raise SystemExit(f"the stream failed: {event['error']['message']}")
    return Timing(first, time.perf_counter() - started, tokens)


async def measure(url: str, key: str, streams: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers={"X-API-Key": key}, timeout=120, limits=limits) as client:
        await one(client, "Hello!", 16)
        alone = [await one(client, f"Tell me a long story about {count} bears.", 200) for count in range(10)]
        prompts = [f"Tell me a long story about {count} foxes." for count in range(4 * streams)]
        gate = asyncio.Semaphore(streams)

        async def gated(prompt: str) -> Timing:
            async with gate:
                return await one(client, prompt, 200)

        started = time.perf_counter()
        together = await asyncio.gather(*(gated(prompt) for prompt in prompts))
        seconds = time.perf_counter() - started
    decoding = [(t.output_tokens - 1) / (t.total_s - t.first_text_s) for t in alone if t.output_tokens > 1]
    return {
        "alone": {
            "first_text_ms_p50": round(statistics.median(t.first_text_s for t in alone) * 1000, 1),
            "tokens_per_second_p50": round(statistics.median(decoding)),
        },
        "together": {
            "streams": streams,
            "first_text_ms_p50": round(statistics.median(t.first_text_s for t in together) * 1000, 1),
            "tokens_per_second": round(sum(t.output_tokens for t in together) / seconds),
        },
    }


def machine() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2)
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": cores,
        "load_average_before": load,
        "python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description="Measures this machine.")
    parser.add_argument("--streams", type=int, default=16, help="how many replies at once (default: 16)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the document there too")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    with server() as running:
        result["ready_s"] = round(running.ready_s, 2)
        result |= asyncio.run(measure(running.url, running.key, args.streams))
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
