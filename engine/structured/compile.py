"""From what a request asks for to a grammar: compiled in a thread of its own, within limits, remembered by tenant.

Owns the cache and the limits. The engine process compiles to refuse what cannot be served, the core to serve it: both
by this. A schema is never looked for anywhere but in itself.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from aiexport_edge.engine.structured.automaton import Automaton, GrammarTooLarge, NoDocument
from aiexport_edge.engine.structured.document import Reader
from aiexport_edge.engine.structured.grammar import check_library
from aiexport_edge.engine.structured.json_grammar import JSON_OBJECT
from aiexport_edge.engine.structured.lark import lark
from aiexport_edge.engine.structured.resolve import UnsupportedSchema
from aiexport_edge.engine.structured.schema import schema_grammar

ANY_OBJECT = b""  # the grammar of `json_object`; any other is the text of a JSON Schema
MAX_SCHEMA_BYTES = 64 << 10
MAX_STATES = 10_000  # 60 ms of a thread, which holds the interpreter most of that time
MAX_LARK_CHARACTERS = 1 << 20
MAX_SHORTEST_BYTES = 16 << 10
MAX_KEPT = 256  # compiled grammars
MAX_KEPT_STATES = 200_000
MAX_WAITING = 64  # grammars to compile at once, over all tenants

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar as both of its readers have it: `reader` follows documents, `lark` is for token masks."""

    reader: Reader
    lark: str
    num_states: int


def compile_grammar(grammar: bytes) -> Compiled:
    """Compiles `ANY_OBJECT` or a JSON Schema. Raises `UnsupportedSchema`. CPU time is bounded by the limits above."""
    if grammar == ANY_OBJECT:
        automaton = Automaton(JSON_OBJECT, max_states=MAX_STATES)
        return Compiled(Reader(automaton), lark(JSON_OBJECT), automaton.num_states)
    if len(grammar) > MAX_SCHEMA_BYTES:
        raise UnsupportedSchema("", f"it has {len(grammar)} bytes; at most {MAX_SCHEMA_BYTES} are taken")
    try:
        rules = schema_grammar(json.loads(grammar))
        automaton = Automaton(rules, max_states=MAX_STATES)
        text = lark(rules)
    except (GrammarTooLarge, RecursionError):
        raise UnsupportedSchema("", "it is too large: too many members, too large counts or patterns") from None
    except NoDocument:
        raise UnsupportedSchema("", "no document satisfies this schema") from None
    except ValueError:
        raise UnsupportedSchema("", "it is not JSON") from None
    reader = Reader(automaton)
    if reader.num_bytes_left(reader.beginning) > MAX_SHORTEST_BYTES:
        raise UnsupportedSchema("", f"its shortest document has more than {MAX_SHORTEST_BYTES} bytes")
    if len(text) > MAX_LARK_CHARACTERS or not check_library(text):
        raise UnsupportedSchema("", "it is too large: too many members, too large counts or patterns")
    return Compiled(reader, text, automaton.num_states)


class Busy(Exception):
    """Too many grammars wait to be compiled."""


class GrammarCache:
    """Compiled grammars of tenants, least recently used gone first. One thread compiles; methods are for one thread.

    What one tenant has sent is never found by another: the tenant's cache salt is part of its name.
    """

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[tuple[bytes, bytes], Compiled] = OrderedDict()
        self._num_states = 0
        self._running: dict[tuple[bytes, bytes], Future[Compiled]] = {}
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
        """Compiles it in the thread. The future raises `UnsupportedSchema`. Raises `Busy`."""
        name = _name(salt, grammar)
        with self._lock:
            running = self._running.get(name)
            if running is not None:
                return running
            if len(self._running) >= MAX_WAITING:
                raise Busy
            future = self._running[name] = self._thread().submit(compile_grammar, grammar)
        future.add_done_callback(lambda done: self._keep(name, done))
        return future

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Something else for that thread, after what it has to do already."""
        with self._lock:
            return self._thread().submit(function)

    def close(self) -> None:
        """Frees the thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _thread(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        return self._executor

    def _keep(self, name: tuple[bytes, bytes], future: Future[Compiled]) -> None:
        with self._lock:
            self._running.pop(name, None)
            if future.cancelled() or future.exception() is not None:
                return
            compiled = future.result()
            self._kept[name] = compiled
            self._num_states += compiled.num_states
            while len(self._kept) > MAX_KEPT or (self._num_states > MAX_KEPT_STATES and len(self._kept) > 1):
                self._num_states -= self._kept.popitem(last=False)[1].num_states


def _name(salt: bytes, grammar: bytes) -> tuple[bytes, bytes]:
    return (salt if grammar else b"", grammar)  # that of any object is everybody's
