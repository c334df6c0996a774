"""A compiled grammar as bytes, on its way from the process that compiled it to those that use it.

Owns the format alone, which is for processes of one installation: whoever unpacks trusts whoever packed. Unpacking a
grammar of ten thousand states takes well under a millisecond: its parts are arrays, not objects.
"""

from __future__ import annotations

import zlib

import msgspec

from aiexport_edge.engine.structured.automaton import Automaton, Columns
from aiexport_edge.engine.structured.compile import ANY_OBJECT, Compiled, compile_grammar
from aiexport_edge.engine.structured.document import Reader


class _Packed(msgspec.Struct, frozen=True, array_like=True):
    lark: str
    columns: Columns


_decoder = msgspec.msgpack.Decoder(_Packed)


def pack(compiled: Compiled) -> bytes:
    """The inverse of `unpack`."""
    return zlib.compress(msgspec.msgpack.encode(_Packed(compiled.lark, compiled.reader.automaton.columns())), 1)


def unpack(data: bytes) -> Compiled:
    """What `pack` was given, and `ANY_OBJECT`, which is compiled where it is needed."""
    if data == ANY_OBJECT:
        return compile_grammar(ANY_OBJECT)
    packed = _decoder.decode(zlib.decompress(data))
    automaton = Automaton.of(packed.columns)
    return Compiled(Reader(automaton), packed.lark, automaton.num_states)
