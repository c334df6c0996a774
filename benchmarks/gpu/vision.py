"""Part i: vision towers of published shapes: the share of what the tensor cores allow, and of their products alone."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.report import Bench
from benchmarks.gpu.timing import matmul_rate, seconds_of
from benchmarks.towers import operations, products_alone, published_vision, random_tower, tiny

PART = "i"
DTYPE = torch.bfloat16
MODELS = ("Qwen3-VL-2B-Instruct", "Qwen3-VL-8B-Instruct")
SIDES = (256, 512, 1024, 2048)  # pixels of square pictures


def run(bench: Bench) -> None:
    """A row for each tower and picture: milliseconds, pictures a second, the share of the bound and of its products."""
    rate = matmul_rate(bench, DTYPE)
    for name in MODELS[:1] if bench.dry_run else MODELS:
        vision = published_vision(name)
        made = random_tower(tiny(vision) if bench.dry_run else vision, dtype=DTYPE, device=bench.device)
        for side in [64] if bench.dry_run else SIDES:
            grid = (side // vision.patch_size, side // vision.patch_size)
            pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, device=bench.device)
            seconds = seconds_of(bench, partial(made.tower.encode, pixels))
            products = seconds_of(bench, products_alone(made, grid))
            features = made.tower.encode(pixels)
            finite = all(bool(each.isfinite().all()) for each in (features.tokens, *features.deepstack))
            row = {
                "tokens": vision.num_tokens(grid),
                "ms": seconds * 1e3,
                "images_per_s": 1 / seconds,
                "share": operations(made.tower, grid) / rate / seconds,
                "products_share": products / seconds,
                "ok": finite,
            }
            bench.add(PART, f"{name} {side} x {side}", row)
