"""Schemas compiled in a process of their own, remembered by tenant.

Owns that process (`worker.py`): started with the first schema, ended when none has come for a while, killed where one
takes too long. A schema that it dies of is refused. Compiling holds neither this process's interpreter nor its memory.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import msgspec

from aiexport_edge.engine.structured.compile import (
    ANY_OBJECT,
    MAX_KEPT,
    MAX_KEPT_STATES,
    TOO_LARGE,
    Compiled,
    check_size,
    compile_grammar,
)
from aiexport_edge.engine.structured.packed import unpack
from aiexport_edge.engine.structured.resolve import UnsupportedSchema
from aiexport_edge.engine.workers import Worker, WorkerDied

log = logging.getLogger(__name__)
T = TypeVar("T")

WORKER_COMMAND = (sys.executable, "-m", "aiexport_edge.engine.structured.worker")
TIMEOUT_S = 10.0  # of the processor: twenty times what the largest takes
PATIENCE = 12.0  # times as long by the clock: the process is nice, and a busy machine leaves it little
IDLE_S = 60.0  # then the process ends
DEATHS = 2  # of the process that one schema may cost: the first may have been no fault of it
MAX_WAITING = 64  # grammars to compile at once, over all tenants
MAX_TENANT_WAITING = 16  # of one


class Busy(Exception):
    """Too many grammars wait to be compiled, of this tenant or of all."""


class Unavailable(Exception):
    """There is no process to compile with."""


class Compiler:
    """One process. `compile` and `end` from one thread, which lives as long as this does."""

    def __init__(self, command: Sequence[str] = WORKER_COMMAND, *, timeout_s: float = TIMEOUT_S) -> None:
        self._command = command
        self._timeout_s = timeout_s
        self._worker: Worker | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        worker = self._worker
        return None if worker is None else worker.pid

    def compile(self, grammar: bytes) -> Compiled:
        """Raises `UnsupportedSchema`, and `Unavailable` where no process can be started."""
        if grammar == ANY_OBJECT:
            return compile_grammar(grammar)  # ours, and small
        check_size(grammar)
        for _ in range(DEATHS):
            try:
                (answer,) = self._started().ask([grammar], self._timeout_s, patience=PATIENCE)
            except WorkerDied:
                log.warning("the process that compiles schemas died (%d) of one of %d bytes", self.end(), len(grammar))
                continue
            except TimeoutError:
                log.warning("a schema of %d bytes was not compiled within %.0f s", len(grammar), self._timeout_s)
                self.end()
                raise UnsupportedSchema("", "it takes too long to compile; simplify it") from None
            packed = answer[1:]
            if answer[:1] == b"-":
                raise UnsupportedSchema(*msgspec.json.decode(packed, type=tuple[str, str]))
            return replace(unpack(packed), packed=packed)
        raise UnsupportedSchema("", TOO_LARGE)

    def end(self) -> int:
        """Ends the process, if there is one; its exit status."""
        worker, self._worker = self._worker, None
        return 0 if worker is None else worker.end()

    def close(self) -> None:
        """From any thread: from here on nothing is compiled; `end` is still to be called."""
        self._closed = True
        worker = self._worker
        if worker is not None:
            worker.kill()

    def _started(self) -> Worker:
        if self._closed:
            raise Unavailable
        if self._worker is None:
            try:
                self._worker = Worker(self._command)
            except OSError as error:
                log.error("no process can be started to compile schemas: %s", error)
                raise Unavailable from error
            if self._closed:  # meanwhile, by one that saw no process yet
                self._worker.kill()
        return self._worker


class GrammarCache:
    """Compiled grammars of tenants, least recently used gone first. One thread waits for the compiler; methods are for
    the event loop's.

    What one tenant has sent is never found by another: the tenant's cache salt is part of its name.
    """

    def __init__(self, compiler: Compiler | None = None, *, idle_s: float = IDLE_S) -> None:
        self._compiler = compiler or Compiler()
        self._idle_s = idle_s
        self._idle_timer: asyncio.TimerHandle | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[tuple[bytes, bytes], Compiled] = OrderedDict()
        self._num_states = 0
        self._running: dict[tuple[bytes, bytes], Future[Compiled]] = {}
        self._of_tenants: Counter[bytes] = Counter()  # of `_running`
        self._lock = threading.Lock()

    def get(self, salt: bytes, grammar: bytes) -> Compiled | None:
        """If it is there already."""
        name = _name(salt, grammar)
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                self._kept.move_to_end(name)
            return found

    def submit(self, salt: bytes, grammar: bytes) -> Future[Compiled]:
        """Compiles it. The future raises what `Compiler.compile` does. Raises `Busy`."""
        name = _name(salt, grammar)
        with self._lock:
            running = self._running.get(name)
            if running is not None:
                return running
            if len(self._running) >= MAX_WAITING or self._of_tenants[salt] >= MAX_TENANT_WAITING:
                raise Busy
            self._of_tenants[salt] += 1
            future = self._running[name] = self._thread().submit(self._compiler.compile, grammar)
        future.add_done_callback(lambda done: self._keep(name, salt, done))
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._idle_timer = asyncio.get_running_loop().call_later(self._idle_s, self._rest)
        return future

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Something else for that thread, after what it has to do already."""
        with self._lock:
            return self._thread().submit(function)

    def close(self) -> None:
        """Ends the process and frees the thread."""
        self._compiler.close()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._executor is not None:
            for future in list(self._running.values()):
                future.cancel()
            self._executor.submit(self._compiler.end)
            self._executor.shutdown(wait=False)

    def _rest(self) -> None:
        """Nobody has asked for long."""
        self._idle_timer = None
        self.run(self._compiler.end)

    def _thread(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        return self._executor

    def _keep(self, name: tuple[bytes, bytes], salt: bytes, future: Future[Compiled]) -> None:
        with self._lock:
            self._running.pop(name, None)
            self._of_tenants[salt] -= 1
            if not self._of_tenants[salt]:
                del self._of_tenants[salt]
            if future.cancelled() or future.exception() is not None:
                return
            compiled = future.result()
            self._kept[name] = compiled
            self._num_states += compiled.num_states
            while len(self._kept) > MAX_KEPT or (self._num_states > MAX_KEPT_STATES and len(self._kept) > 1):
                self._num_states -= self._kept.popitem(last=False)[1].num_states


def _name(salt: bytes, grammar: bytes) -> tuple[bytes, bytes]:
    return (salt if grammar else b"", grammar)  # that of any object is everybody's
