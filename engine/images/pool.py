"""The engine's worker processes for pictures: as many as are wanted, started when there is work, ended when idle.

Owns their lives and what their deaths mean. A file that a worker dies of, or that takes too long, costs that worker and
is refused; the engine process itself never decodes. Each job runs in a thread that waits on the worker's socket, so
that megabytes of pixels do not pass through the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from aiexport_edge.engine.images.limits import FORMATS, ImageError, ImageLimits
from aiexport_edge.engine.images.patches import PatchConfig
from aiexport_edge.engine.images.worker import Answer, Failed, Job
from aiexport_edge.engine.workers import Worker, WorkerDied

log = logging.getLogger(__name__)

WORKER_COMMAND = (sys.executable, "-m", "aiexport_edge.engine.images.worker")
IDLE_S = 60.0  # then a worker ends
DEATHS = 2  # of workers that one file may cost: the first may have been no fault of it
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # what a picture took goes back when it is done


class PoolError(Exception):
    """There is no worker to be had; a sentence."""


@dataclass(frozen=True, slots=True)
class Pixels:
    """A decoded picture of the size that its model wants: uint8 [rows * patch, columns * patch, 3] as bytes."""

    rows: int
    columns: int
    digest: bytes
    data: bytes


class ImagePool:
    """At most `num_workers` files are decoded at one time; others wait in order. `decode` from one event loop."""

    def __init__(
        self,
        limits: ImageLimits,
        *,
        num_workers: int,
        timeout_s: float,
        idle_s: float = IDLE_S,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.limits = limits
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._command = command
        self._threads = ThreadPoolExecutor(num_workers, "images")
        self._lock = threading.Lock()
        self._idle: list[tuple[Worker, float]] = []  # and since when; the last used is used first
        self._busy: set[Worker] = set()
        self._closed = False
        self._reaping: asyncio.TimerHandle | None = None

    @property
    def num_workers(self) -> int:
        """Processes that there are just now."""
        with self._lock:
            return len(self._idle) + len(self._busy)

    async def decode(self, data: bytes | Sequence[bytes], media_type: str, patches: PatchConfig) -> Pixels:
        """A file, whole or in pieces. Raises `ImageError`, and `PoolError` where no process can be started."""
        if media_type not in FORMATS:
            raise ImageError(f"the media type must be one of {', '.join(FORMATS)}")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, self._decode, data, media_type, patches)
        finally:
            if self._reaping is None and not self._closed:
                self._reaping = loop.call_later(self._idle_s, self._reap)

    def close(self) -> None:
        """Ends every worker, also those at work."""
        if self._reaping is not None:
            self._reaping.cancel()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for worker in self._busy:
                worker.kill()  # and its thread reaps it
        for worker, _ in idle:
            worker.end()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------ in a thread

    def _decode(self, data: bytes | Sequence[bytes], media_type: str, patches: PatchConfig) -> Pixels:
        if not isinstance(data, bytes):
            data = b"".join(data)
        question = [msgspec.msgpack.encode(Job(media_type, self.limits, patches)), data]
        for _ in range(DEATHS):
            worker = self._take()
            usable = False
            try:
                body, *pixels = worker.ask(question, self._timeout_s)
                usable = True
            except WorkerDied:
                log.warning("a worker for pictures died (%s) of a file of %d bytes", worker.end(), len(data))
                continue
            except TimeoutError:
                log.warning("a picture of %d bytes took longer than %.0f s", len(data), self._timeout_s)
                raise ImageError("the image takes too long to decode; send a smaller one") from None
            finally:
                self._give_back(worker, usable=usable)
            answer = _ANSWERS.decode(body)
            if isinstance(answer, Failed):
                raise ImageError(answer.message)
            return Pixels(answer.rows, answer.columns, answer.digest, pixels[0])
        raise ImageError("the file is broken: decoding it failed")

    def _take(self) -> Worker:
        found, dead = self._take_idle()
        for worker in dead:
            log.warning("a worker for pictures died (%s) while it was idle", worker.end())
        if found is not None:
            return found
        try:
            worker = Worker([*self._command, *_arguments(self.limits)], _ENVIRONMENT)
        except OSError as error:
            log.error("no worker for pictures can be started: %s", error)
            raise PoolError("Pictures cannot be decoded just now.") from error
        with self._lock:
            self._busy.add(worker)
            if self._closed:
                worker.kill()
        return worker

    def _take_idle(self) -> tuple[Worker | None, list[Worker]]:
        """One that lives, and those that were found dead: no file's fault."""
        dead: list[Worker] = []
        with self._lock:
            if self._closed:
                raise PoolError("The engine is ending.")
            while self._idle:
                worker, _ = self._idle.pop()
                if worker.lives:
                    self._busy.add(worker)
                    return worker, dead
                dead.append(worker)
        return None, dead

    def _give_back(self, worker: Worker, *, usable: bool) -> None:
        with self._lock:
            self._busy.discard(worker)
            if usable and not self._closed:
                self._idle.append((worker, time.monotonic()))
                return
        worker.end()

    # ------------------------------------------------------------------------------------------ on the event loop

    def _reap(self) -> None:
        """Ends those that have had nothing to do for long."""
        long_ago = time.monotonic() - self._idle_s
        with self._lock:
            old = [worker for worker, since in self._idle if since <= long_ago]
            self._idle = [(worker, since) for worker, since in self._idle if since > long_ago]
            left = len(self._idle) + len(self._busy)
        for worker in old:
            worker.end()
        self._reaping = asyncio.get_running_loop().call_later(self._idle_s, self._reap) if left else None


def _arguments(limits: ImageLimits) -> list[str]:
    return ["--max-bytes", str(limits.max_bytes), "--max-pixels", str(limits.max_pixels)]


_ANSWERS = msgspec.msgpack.Decoder(Answer)
