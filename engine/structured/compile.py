"""From what a request asks for to a grammar, within limits.

Owns the limits. A schema, which is a stranger's, is compiled in a process of its own (`compiler.py`) and travels from
there as bytes (`packed.py`). It is never looked for anywhere but in itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from aiexport_edge.engine.structured.automaton import Automaton, GrammarTooLarge, NoDocument
from aiexport_edge.engine.structured.document import Reader
from aiexport_edge.engine.structured.grammar import check_library
from aiexport_edge.engine.structured.json_grammar import JSON_OBJECT
from aiexport_edge.engine.structured.lark import lark
from aiexport_edge.engine.structured.resolve import UnsupportedSchema
from aiexport_edge.engine.structured.schema import schema_grammar

ANY_OBJECT = b""  # the grammar of `json_object`; any other is the text of a JSON Schema
MAX_SCHEMA_BYTES = 64 << 10
MAX_STATES = 10_000  # 60 ms
MAX_LARK_CHARACTERS = 1 << 20
MAX_SHORTEST_BYTES = 16 << 10
MAX_KEPT = 256  # compiled grammars
MAX_KEPT_STATES = 200_000
TOO_LARGE = "it is too large: too many members, too large counts or patterns"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar as both of its readers have it: `reader` follows documents, `lark` is for token masks. `packed` is what
    the core is given (`packed.unpack`), where it has been packed.
    """

    reader: Reader
    lark: str
    num_states: int
    packed: bytes = ANY_OBJECT


def check_size(grammar: bytes) -> None:
    """Raises `UnsupportedSchema`."""
    if len(grammar) > MAX_SCHEMA_BYTES:
        raise UnsupportedSchema("", f"it has {len(grammar)} bytes; at most {MAX_SCHEMA_BYTES} are taken")


def compile_grammar(grammar: bytes) -> Compiled:
    """Compiles `ANY_OBJECT` or a JSON Schema. Raises `UnsupportedSchema`. CPU time is bounded by the limits above."""
    if grammar == ANY_OBJECT:
        automaton = Automaton.build(JSON_OBJECT, max_states=MAX_STATES)
        return Compiled(Reader(automaton), lark(JSON_OBJECT), automaton.num_states)
    check_size(grammar)
    try:
        rules = schema_grammar(json.loads(grammar))
        automaton = Automaton.build(rules, max_states=MAX_STATES)
        text = lark(rules)
    except (GrammarTooLarge, RecursionError):
        raise UnsupportedSchema("", TOO_LARGE) from None
    except NoDocument:
        raise UnsupportedSchema("", "no document satisfies this schema") from None
    except ValueError:
        raise UnsupportedSchema("", "it is not JSON") from None
    reader = Reader(automaton)
    if reader.num_bytes_left(reader.beginning) > MAX_SHORTEST_BYTES:
        raise UnsupportedSchema("", f"its shortest document has more than {MAX_SHORTEST_BYTES} bytes")
    if len(text) > MAX_LARK_CHARACTERS or not check_library(text):
        raise UnsupportedSchema("", TOO_LARGE)
    return Compiled(reader, text, automaton.num_states)
