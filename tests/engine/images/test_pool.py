"""The worker processes: what they answer, what ends them, and that a bad file costs nobody else anything."""

from __future__ import annotations

import asyncio
import hashlib
import io
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from support.edge import wait_until

from aiexport_edge.engine.images.limits import ImageError, ImageLimits
from aiexport_edge.engine.images.patches import PatchConfig
from aiexport_edge.engine.images.pool import WORKER_COMMAND, ImagePool, PoolError
from aiexport_edge.engine.images.resize import resize

PATCHES = PatchConfig(4, 2, 2, 64, 4096, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PICTURE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 30, 3), dtype=np.uint8))
# Stand in for a worker: one dies of what it gets, one never answers.
DIES = (sys.executable, "-c", "import os, sys; os.read(int(sys.argv[2]), 1); os._exit(9)")
HANGS = (sys.executable, "-c", "import time; time.sleep(600)")
# The first is killed while it has a file; those after it are as ever.
DIES_ONCE = """\
import os, sys
if not os.path.exists(sys.argv[1]):
    open(sys.argv[1], "w").close()
    os.read(int(sys.argv[-1]), 1)
    os.kill(os.getpid(), 9)
os.execv(sys.argv[2], sys.argv[2:])
"""


def png(image: Image.Image = PICTURE) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def run(work: Callable[[ImagePool], Coroutine[Any, Any, None]], **options: Any) -> None:
    async def whole() -> None:
        pool = ImagePool(ImageLimits(), **{"num_workers": 2, "timeout_s": 120.0, **options})
        try:
            await work(pool)
        finally:
            pool.close()

    asyncio.run(whole())


def test_a_picture_comes_back_resized_with_its_digest() -> None:
    async def work(pool: ImagePool) -> None:
        assert pool.num_workers == 0
        pixels = await pool.decode(png(), "image/png", PATCHES)
        assert pixels.data == resize(PICTURE, PATCHES).tobytes()
        assert (pixels.rows, pixels.columns) == PATCHES.grid(50, 30)
        head = struct.pack("<II", pixels.rows, pixels.columns)
        assert pixels.digest == hashlib.blake2b(head + pixels.data, digest_size=32).digest()
        assert pool.num_workers == 1

    run(work)


def test_many_at_once_take_no_more_workers_than_there_may_be() -> None:
    async def work(pool: ImagePool) -> None:
        found = await asyncio.gather(*(pool.decode(png(), "image/png", PATCHES) for _ in range(20)))
        assert len({pixels.digest for pixels in found}) == 1
        assert pool.num_workers <= 2

    run(work)


def test_what_is_no_picture_is_told_and_the_worker_lives_on() -> None:
    async def work(pool: ImagePool) -> None:
        for data in (b"", b"\x89PNG\r\n\x1a\n", png()[:60]):
            with pytest.raises(ImageError):
                await pool.decode(data, "image/png", PATCHES)
        with pytest.raises(ImageError, match="is image/png, not image/gif"):
            await pool.decode(png(), "image/gif", PATCHES)
        with pytest.raises(ImageError, match="media type must be one of"):
            await pool.decode(png(), "video/mp4", PATCHES)
        with pytest.raises(ImageError, match="at most 200 times"):
            await pool.decode(png(Image.new("L", (1, 300))), "image/png", PATCHES)
        await pool.decode(png(), "image/png", PATCHES)
        assert pool.num_workers == 1

    run(work, num_workers=1)


def test_a_file_that_kills_its_worker_is_refused() -> None:
    async def work(pool: ImagePool) -> None:
        with pytest.raises(ImageError, match="decoding it failed"):
            await pool.decode(png(), "image/png", PATCHES)
        assert pool.num_workers == 0

    run(work, command=DIES)


def test_a_file_whose_worker_is_killed_once_is_decoded_by_another(tmp_path: Path) -> None:
    async def work(pool: ImagePool) -> None:
        assert (await pool.decode(png(), "image/png", PATCHES)).data == resize(PICTURE, PATCHES).tobytes()
        assert (tmp_path / "died").exists()
        assert pool.num_workers == 1

    run(work, command=(sys.executable, "-c", DIES_ONCE, str(tmp_path / "died"), *WORKER_COMMAND))


def test_workers_that_were_killed_while_idle_cost_no_file() -> None:
    async def work(pool: ImagePool) -> None:
        await asyncio.gather(*(pool.decode(png(), "image/png", PATCHES) for _ in range(9)))
        workers = [
            child for child in psutil.Process().children() if "aiexport_edge.engine.images.worker" in child.cmdline()
        ]
        assert workers
        for worker in workers:
            worker.kill()
        zombies = [psutil.STATUS_ZOMBIE] * len(workers)
        wait_until(lambda: [worker.status() for worker in workers] == zombies, "the workers have ended")
        await pool.decode(png(), "image/png", PATCHES)
        assert pool.num_workers == 1

    run(work, num_workers=3)


def test_a_worker_that_hangs_is_ended() -> None:
    async def work(pool: ImagePool) -> None:
        with pytest.raises(ImageError, match="takes too long"):
            await pool.decode(png(), "image/png", PATCHES)
        assert pool.num_workers == 0

    run(work, command=HANGS, timeout_s=0.2)


def test_where_there_is_no_process_it_is_said() -> None:
    async def work(pool: ImagePool) -> None:
        with pytest.raises(PoolError):
            await pool.decode(png(), "image/png", PATCHES)

    run(work, command=("/nonexistent",))


def test_a_worker_has_only_the_memory_that_a_picture_may_take() -> None:
    """A picture just within the limit of pixels decodes in every mode; what would take more than its worker may is an
    ImageError, not a worker that grows."""
    limits = ImageLimits(max_bytes=4 << 20, max_pixels=4_000_000)

    async def work(pool: ImagePool) -> None:
        pool.limits = limits
        for mode in ("RGB", "RGBA", "LA", "I;16"):
            await pool.decode(png(Image.new(mode, (2000, 2000))), "image/png", PATCHES)
        pool.limits = ImageLimits()  # the worker was told less when it started
        with pytest.raises(ImageError, match="memory"):
            await pool.decode(png(Image.new("RGBA", (8000, 7000))), "image/png", PATCHES)
        await pool.decode(png(), "image/png", PATCHES)

    async def with_limits() -> None:
        pool = ImagePool(limits, num_workers=1, timeout_s=120.0)
        try:
            await work(pool)
        finally:
            pool.close()

    asyncio.run(with_limits())


def test_the_engine_process_loads_no_decoder_and_a_worker_no_torch() -> None:
    for module, forbidden in (
        ("aiexport_edge.engine.server.process", "PIL numpy torch"),
        ("aiexport_edge.engine.images.worker, aiexport_edge.engine.images.decode", "torch transformers grpc"),
    ):
        code = f"import sys, {module}\nprint([name for name in {forbidden!r}.split() if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


def test_an_idle_worker_ends_and_the_next_picture_gets_another() -> None:
    async def work(pool: ImagePool) -> None:
        await pool.decode(png(), "image/png", PATCHES)
        await asyncio.to_thread(wait_until, lambda: pool.num_workers == 0, "the idle worker has ended")
        await pool.decode(png(), "image/png", PATCHES)

    run(work, idle_s=0.05)
