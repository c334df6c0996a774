"""A process that compiles schemas for the engine: `python -m aiexport_edge.engine.structured.worker --fd N`.

A question is the text of a JSON Schema; the answer is `b"+"` and the packed grammar, or `b"-"` and why there is none:
its place and problem, as JSON. Each is a message of one part.
"""

from __future__ import annotations

import argparse
import os

import msgspec

from aiexport_edge.engine.structured.compile import TOO_LARGE, compile_grammar
from aiexport_edge.engine.structured.packed import pack
from aiexport_edge.engine.structured.resolve import UnsupportedSchema
from aiexport_edge.engine.workers import serve
from aiexport_edge.proto.lifetime import die_with_parent

MEMORY_BYTES = 512 << 20  # the largest schema that is taken has needed a fifth


def answer(question: list[bytes]) -> list[bytes]:
    """See the module."""
    try:
        return [b"+" + pack(compile_grammar(question[0]))]
    except UnsupportedSchema as error:
        return [b"-" + msgspec.json.encode((error.place, error.problem))]
    except (MemoryError, RecursionError):
        return [b"-" + msgspec.json.encode(("", TOO_LARGE))]


def main() -> int:
    """Serves until its parent is gone."""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    serve(parser.parse_args().fd, answer, memory_bytes=MEMORY_BYTES)
    return 0


if __name__ == "__main__":
    os._exit(main())
