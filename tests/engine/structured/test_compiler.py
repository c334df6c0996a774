"""Schemas compiled in another process: the same grammars, refusals with their words, and what a death there means."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.engine.structured.compile import ANY_OBJECT, MAX_SCHEMA_BYTES, Compiled, compile_grammar
from aiexport_edge.engine.structured.compiler import MAX_TENANT_WAITING, Busy, Compiler, GrammarCache, Unavailable
from aiexport_edge.engine.structured.packed import pack, unpack
from aiexport_edge.engine.structured.resolve import UnsupportedSchema
from aiexport_edge.engine.workers import Worker

SCHEMA = {
    "type": "object",
    "properties": {
        "kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 3},
        "name": {"type": "string", "maxLength": 5},
        "é": {"anyOf": [{"type": "integer", "minimum": -3, "maximum": 12}, {"enum": ["x", "abc"]}]},
    },
    "required": ["kids"],
    "additionalProperties": False,
}


def text_of(schema: Any) -> bytes:
    return json.dumps(schema).encode()


def member(number: int) -> bytes:
    return text_of({"type": "object", "properties": {f"m{number}": {"type": "integer"}}})


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    made = Compiler(timeout_s=300.0)
    yield made
    made.close()
    made.end()


def walk(compiled: Compiled, seed: int) -> list[bytes]:
    """A document's bytes drawn at random, with the shortest ending at each."""
    rng, reader = random.Random(seed), compiled.reader
    positions, said = reader.beginning, []
    for _ in range(60):
        options = [byte for byte in range(256) if reader.read(positions, bytes([byte]))]
        if not options:
            break
        byte = rng.choice(options)
        positions = reader.read(positions, bytes([byte]))
        said += [bytes([byte]), reader.ending(positions), b"%d" % reader.num_bytes_left(positions)]
    return said


COMPILED = compile_grammar(text_of(SCHEMA))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1 << 32))
def test_a_grammar_that_has_travelled_is_the_same(seed: int) -> None:
    compiled, travelled = COMPILED, unpack(pack(COMPILED))
    assert (travelled.lark, travelled.num_states) == (compiled.lark, compiled.num_states)
    assert walk(travelled, seed) == walk(compiled, seed)


def test_what_the_other_process_compiles_is_what_this_one_would(compiler: Compiler) -> None:
    found = compiler.compile(text_of(SCHEMA))
    assert walk(found, 1) == walk(COMPILED, 1)
    assert unpack(found.packed).lark == found.lark
    assert compiler.compile(ANY_OBJECT).packed == ANY_OBJECT


@pytest.mark.parametrize(
    "schema",
    [
        b"{",
        b"[" * 50_000,
        text_of({"type": "object", "properties": {"a": {"type": "string", "format": "unheard of"}}}),
        text_of({"type": "object", "properties": {f"m{n}": {"type": "string", "maxLength": 999} for n in range(400)}}),
        b" " * (MAX_SCHEMA_BYTES + 1),
    ],
)
def test_refusals_have_the_same_words(compiler: Compiler, schema: bytes) -> None:
    with pytest.raises(UnsupportedSchema) as here:
        compile_grammar(schema)
    with pytest.raises(UnsupportedSchema) as there:
        compiler.compile(schema)
    assert (there.value.place, there.value.problem) == (here.value.place, here.value.problem)


def test_a_death_between_two_schemas_is_nothing_to_either(compiler: Compiler) -> None:
    compiler.compile(member(1))
    assert compiler.pid is not None
    os.kill(compiler.pid, signal.SIGKILL)
    assert compiler.compile(member(2)).num_states


def test_a_schema_that_it_dies_of_is_refused() -> None:
    deadly = Compiler([sys.executable, "-c", "import os; os._exit(3)"], timeout_s=300.0)
    with pytest.raises(UnsupportedSchema, match="too large"):
        deadly.compile(member(1))
    assert deadly.pid is None


def test_a_schema_that_takes_too_long_is_refused_and_its_process_ended() -> None:
    stuck = Compiler([sys.executable, "-c", "import time; time.sleep(1e6)"], timeout_s=0.05)
    with pytest.raises(UnsupportedSchema, match="too long"):
        stuck.compile(member(1))
    assert stuck.pid is None


def test_a_busy_machine_is_no_fault_of_a_schema() -> None:
    """The clock goes on while the process is not given the processor."""
    late = "import socket, sys, time; time.sleep(3); s = socket.socket(fileno=int(sys.argv[-1])); s.recv(9); "
    late += "s.sendall(b'\\1\\0\\0\\0\\2\\0\\0\\0hi'); s.recv(1)"
    worker = Worker([sys.executable, "-S", "-c", late])
    try:
        assert worker.ask([b"x"], 1.5, patience=1000.0) == [b"hi"]
    finally:
        worker.end()


def test_without_a_process_it_is_said_to_be_so() -> None:
    with pytest.raises(Unavailable):
        Compiler(["/nonexistent"]).compile(member(1))


def test_the_process_ends_when_nobody_has_asked_for_long() -> None:
    async def test() -> None:
        compiler, ended = Compiler(timeout_s=300.0), threading.Event()
        end = compiler.end

        def end_and_tell() -> int:
            status = end()
            ended.set()
            return status

        compiler.end = end_and_tell  # type: ignore[method-assign]
        cache = GrammarCache(compiler, idle_s=0.01)
        await asyncio.wrap_future(cache.submit(b"salt", member(1)))
        assert await asyncio.to_thread(ended.wait, 60)
        assert compiler.pid is None
        assert cache.get(b"salt", member(1)) is not None
        assert cache.get(b"other", member(1)) is None
        assert await asyncio.wrap_future(cache.submit(b"salt", member(2)))
        cache.close()

    asyncio.run(test())


def test_one_tenant_leaves_places_to_others_and_closing_ends_all() -> None:
    async def test() -> None:
        compiler = Compiler([sys.executable, "-c", "import time; time.sleep(1e6)"], timeout_s=300.0)
        cache = GrammarCache(compiler)
        waiting: list[Future[Compiled]] = [cache.submit(b"a", member(n)) for n in range(MAX_TENANT_WAITING)]
        with pytest.raises(Busy):
            cache.submit(b"a", member(99))
        assert cache.submit(b"a", member(0)) is waiting[0]
        waiting.append(cache.submit(b"b", member(0)))
        cache.close()
        ends = await asyncio.gather(*map(asyncio.wrap_future, waiting), return_exceptions=True)
        assert all(isinstance(end, Unavailable | asyncio.CancelledError) for end in ends)

    asyncio.run(test())
