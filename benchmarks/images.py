"""Pictures on a CPU: decoding, the vision tower, and what share of its time its products need.

    python -m benchmarks.images [--model Qwen3-VL-2B-Instruct] [--sides 256 512] [--serve] [--dry-run]

Towers of published shapes with random weights, one picture at a time, one thread, processor time; tower and products
take turns, medians. *Floor*: the tower's packed products alone, on inputs of the same shapes, one after the other with
nothing between. What comes on top are attention, norms, activations and copies. *Decoding* is what the engine's worker
does to a JPEG: Pillow, orientation, resizing. Whole requests: `--serve [DIRECTORY]` serves a model with eyes (the demo
model where none is named) and sends pictures over REST, so many at once.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiexport_edge.kernels import threads

os.environ.update(threads.ENVIRONMENT)  # before torch is loaded

import httpx
import numpy as np
import torch
from PIL import Image

from aiexport_edge.engine.images.decode import decode
from aiexport_edge.engine.images.limits import ImageLimits
from aiexport_edge.engine.images.patches import PatchConfig
from aiexport_edge.engine.images.resize import resize
from aiexport_edge.kernels.linear import supports_bf16
from benchmarks.peers.cells import first_token_s
from benchmarks.peers.machine import OthersWatch, commit, describe
from benchmarks.peers.servers import MODEL_ID, Ours
from benchmarks.towers import MadeTower, products_alone, published_vision, random_tower, tiny

DEMO = Path(__file__).resolve().parents[1] / "engine" / "demo" / "model"
HALF = (0.5, 0.5, 0.5)
START_S = 300.0


class Seeing(Ours):
    """`serve` with the whole context of its model."""

    context = 0


def jpeg(side: int, seed: int = 0) -> bytes:
    """A picture with large and small structure, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side))
    noise = rng.integers(-12, 13, (side, side, 3))
    pixels = np.clip(np.asarray(coarse, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(made: MadeTower, side: int, repeats: int) -> dict[str, Any]:
    """A row."""
    vision = made.tower.config
    square = vision.patch_size * vision.merge_size
    config = PatchConfig(
        vision.patch_size, vision.temporal_patch_size, vision.merge_size, square**2, 16_777_216, HALF, HALF
    )
    data, limits = jpeg(side), ImageLimits()
    resized = resize(decode(data, "image/jpeg", limits), config)
    pixels = torch.from_numpy(np.array(resized))
    grid = config.grid(side, side)
    floor = products_alone(made, grid)

    def decoded() -> object:
        return resize(decode(data, "image/jpeg", limits), config)

    runs: tuple[Callable[[], object], ...] = (decoded, lambda: made.tower.encode(pixels), floor)
    for run in runs:
        run()
    times = [[_seconds(run) for run in runs] for _ in range(repeats)]
    decoding, tower, products = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "side": side,
        "tokens": vision.num_tokens(grid),
        "decode_ms": round(1e3 * decoding, 2),
        "tower_ms": round(1e3 * tower, 2),
        "floor_ms": round(1e3 * products, 2),
        "floor_share": round(statistics.median(row[2] / row[1] for row in times), 3),
        "images_per_s": round(1 / (decoding + tower), 2),
    }


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def serve_and_ask(model: Path, *, side: int, streams: int, num_requests: int, num_threads: int) -> dict[str, Any]:
    """Whole requests over REST, one picture each, four tokens of reply; every picture is another."""
    with tempfile.TemporaryDirectory() as folder:
        server = Seeing(model, Path(folder), num_threads)
        server.start()
        try:
            asyncio.run(first_token_s(server, "Hello!", START_S))
            watch = OthersWatch(server.pid)
            whole, took = asyncio.run(_ask(server, side, streams, num_requests))
            return {
                "side": side,
                "streams": streams,
                "requests": num_requests,
                "requests_per_s": round(num_requests / whole, 2),
                "latency_p50_ms": round(1e3 * statistics.median(took), 1),
                "latency_worst_ms": round(1e3 * max(took), 1),
                "others_share": round(watch.share(), 3),
            }
        finally:
            server.stop()


async def _ask(server: Ours, side: int, streams: int, num_requests: int) -> tuple[float, list[float]]:
    """Seconds in all, and of each request."""
    took: list[float] = []
    numbers = iter(range(num_requests))

    async def one_after_the_other(client: httpx.AsyncClient) -> None:
        for number in numbers:
            data = base64.b64encode(jpeg(side, number)).decode()
            content = [
                {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": data}},
                {"type": "text", "text": "What is this?"},
            ]
            body = {"model": MODEL_ID, "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
            started = time.perf_counter()
            (await client.post("/v2/messages", json=body)).raise_for_status()
            took.append(time.perf_counter() - started)

    base = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=base, headers=server.headers(), timeout=START_S) as client:
        started = time.perf_counter()
        await asyncio.gather(*[one_after_the_other(client) for _ in range(streams)])
        return time.perf_counter() - started, took


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["Qwen3-VL-2B-Instruct"], help="whose tower's shapes")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512], help="of square pictures, in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", type=Path, nargs="?", const=DEMO, help="a model with eyes, for whole requests")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of the server")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes: that the program itself works")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    threads.set_num_threads(1)
    dtype = torch.bfloat16 if supports_bf16() else torch.float32
    document: dict[str, Any] = {"machine": describe(), "commit": commit(), "threads": 1, "rows": [], "requests": []}
    document |= {"dtype": str(dtype).removeprefix("torch."), "load_average": [round(x, 2) for x in os.getloadavg()]}
    with torch.inference_mode():
        for name in options.model:
            vision = published_vision(name)
            made = random_tower(tiny(vision) if options.dry_run else vision, dtype=dtype, device=torch.device("cpu"))
            for side in [64] if options.dry_run else options.sides:
                row = {"model": name} | measure(made, side, 2 if options.dry_run else options.repeats)
                document["rows"].append(row)
                print(json.dumps(row), flush=True)
    if options.serve:
        for side, streams in itertools.product(options.sides, options.streams):
            cell = serve_and_ask(
                options.serve.resolve(),
                side=side,
                streams=streams,
                num_requests=options.requests,
                num_threads=options.threads,
            )
            document["requests"].append(cell)
            print(json.dumps(cell), flush=True)
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
