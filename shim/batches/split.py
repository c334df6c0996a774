"""Cuts the body of a batch into its parts while it arrives: one element of `requests` at a time is held, never all.

Owns the outer JSON: the object and the array. What stands in them is found by its brackets and strings alone, and is
for `json_body.parse` to read; so what is cut wrongly (`[}`) fails there. Knows no field but `requests`.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from aiexport_edge.shim import json_body
from aiexport_edge.shim.errors import InvalidRequest, RequestTooLarge, quoted

MAX_PIECES = 20_000_000  # values, and strings and brackets in them: what bounds the time for a hostile body
_MAX_KEY_BYTES = 64 << 10
_SPACE = re.compile(rb"[ \t\r\n]*+")
_MARK = re.compile(rb'["[\]{}]')
_STRING_REST = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,\]}]*+")


@dataclass(frozen=True, slots=True)
class Element:
    """One element of `requests`, as it was written."""

    raw: bytes


@dataclass(frozen=True, slots=True)
class Member:
    """Another field of the body; `requests` itself where it is no array."""

    name: str
    raw: bytes


@dataclass(frozen=True, slots=True)
class Requests:
    """The array `requests` begins. Where it does so again, the last one counts."""


Part: TypeAlias = "Element | Member | Requests"
_Cut: TypeAlias = Generator["Part | None", None, None]


class Splitter:
    """`feed` each piece of the body, then `end`. Both raise `InvalidRequest` and `RequestTooLarge`."""

    def __init__(self, *, max_value_bytes: int) -> None:
        self._max_value_bytes = max_value_bytes
        self._buffer = bytearray()
        self._at = 0  # all before it is done with
        self._num_pieces = 0
        self._index = 0  # in `requests`
        self._ended = False
        self._cutting = self._document()

    @property
    def held_bytes(self) -> int:
        return len(self._buffer)

    def feed(self, piece: bytes) -> Iterator[Part]:
        """The parts that are complete with this piece. Each must be taken before the next piece is fed."""
        del self._buffer[: self._at]
        self._at = 0
        self._buffer += piece
        for part in self._cutting:
            if part is None:
                return
            yield part

    def end(self) -> Iterator[Part]:
        """What the end of the body completes: nothing, or an error."""
        if not self._ended:
            if not self._buffer.strip():
                raise InvalidRequest("The request body is empty; it must be a JSON object.")
            raise self._invalid("it ends too early")
        return iter(())

    # ------------------------------------------------------------------------------------------ the outer JSON

    def _document(self) -> _Cut:
        first = yield from self._next()
        if first == b"\xef":
            raise InvalidRequest("The request body starts with a byte order mark, which JSON does not allow.")
        if first != b"{":
            raise InvalidRequest("The request body must be a JSON object.")
        self._at += 1
        if (yield from self._next()) == b"}":
            self._at += 1
        else:
            while True:
                yield from self._member()
                if (yield from self._separator(b"}")) == b"}":
                    break
        self._ended = True
        while True:  # nothing but space may follow
            self._skip_space()
            if self._at < len(self._buffer):
                raise self._invalid("there is something after its end")
            yield None

    def _member(self) -> _Cut:
        if (yield from self._next()) != b'"':
            raise self._invalid('a field must begin with "')
        raw_name = yield from self._value(_MAX_KEY_BYTES, "a field's name")
        name = str(json_body.parse(raw_name))
        if (yield from self._next()) != b":":
            raise self._invalid("a field's name must be followed by a colon")
        self._at += 1
        if name == "requests" and (yield from self._next()) == b"[":
            yield Requests()
            yield from self._elements()
        else:
            yield from self._next()
            shown = quoted(name)[1:-1]  # it may hold what no reply can
            yield Member(name, (yield from self._value(self._max_value_bytes, shown)))

    def _elements(self) -> _Cut:
        self._at += 1
        self._index = 0
        if (yield from self._next()) == b"]":
            self._at += 1
            return
        while True:
            yield from self._next()
            yield Element((yield from self._value(self._max_value_bytes, f"requests.{self._index}")))
            self._index += 1
            if (yield from self._separator(b"]")) == b"]":
                return

    # ------------------------------------------------------------------------------------------ pieces of it

    def _skip_space(self) -> None:
        found = _SPACE.match(self._buffer, self._at)
        assert found is not None
        self._at = found.end()

    def _next(self) -> Generator[None, None, bytes]:
        """The next byte that is no space; it stays."""
        while True:
            self._skip_space()
            if self._at < len(self._buffer):
                return bytes(self._buffer[self._at : self._at + 1])
            yield None

    def _separator(self, end: bytes) -> Generator[None, None, bytes]:
        found = yield from self._next()
        if found not in (b",", end):
            raise self._invalid(f'a comma or "{end.decode()}" must follow')
        self._at += 1
        return found

    def _value(self, max_bytes: int, where: str) -> Generator[None, None, bytes]:
        """The value that begins here, whatever it is; each of its bytes is looked at once, however it arrives."""
        self._count(1)
        at, depth, in_string = self._at, 0, False
        start = at
        if bytes(self._buffer[at : at + 1]) not in (b'"', b"[", b"{"):
            return (yield from self._scalar(max_bytes, where))
        while True:
            at, depth, in_string, done = self._scan(at, depth, in_string)
            if at - start > max_bytes:
                raise RequestTooLarge(f"{where}: is larger than {max_bytes:,} bytes", param=where)
            if done:
                raw = bytes(self._buffer[start:at])
                self._at = at
                return raw
            self._at = start  # `feed` drops what lies before it
            yield None
            at -= start
            start = 0

    def _scan(self, at: int, depth: int, in_string: bool) -> tuple[int, int, bool, bool]:
        """Goes on from `at` to the value's end, or to what cannot be told yet."""
        buffer = self._buffer
        num_pieces = 0
        while True:
            if in_string:
                at = _string_end(buffer, at)
                if buffer[at : at + 1] != b'"':  # the end of the buffer, or a backslash whose second half is to come
                    break
                at += 1
                in_string = False
                if depth == 0:
                    return at, depth, in_string, True
            mark = _MARK.search(buffer, at)
            if mark is None:
                at = len(buffer)
                break
            at = mark.end()
            num_pieces += 1
            found = mark[0]
            if found == b'"':
                in_string = True
            elif found in b"[{":
                depth += 1
            else:
                depth -= 1
                if depth == 0:
                    break
        self._count(num_pieces)
        return at, depth, in_string, depth == 0 and not in_string

    def _count(self, num_pieces: int) -> None:
        self._num_pieces += num_pieces
        if self._num_pieces > MAX_PIECES:
            raise InvalidRequest(f"The request body holds more than {MAX_PIECES:,} JSON values.")

    def _scalar(self, max_bytes: int, where: str) -> Generator[None, None, bytes]:
        while True:
            found = _SCALAR.match(self._buffer, self._at)
            assert found is not None
            if found.end() - self._at > max_bytes:
                raise RequestTooLarge(f"{where}: is larger than {max_bytes:,} bytes", param=where)
            if found.end() < len(self._buffer):
                if not found[0]:
                    raise self._invalid("a value is missing")
                raw = bytes(found[0])
                self._at = found.end()
                return raw
            yield None

    def _invalid(self, problem: str) -> InvalidRequest:
        where = f" (near requests.{self._index})" if self._index else ""
        return InvalidRequest(f"The request body is not valid JSON: {problem}{where}.")


def _string_end(buffer: bytearray, at: int) -> int:
    """Where the rest of a string from `at` ends: at its quote, or before what cannot be told yet."""
    quote = buffer.find(b'"', at)
    end = quote if quote >= 0 else len(buffer)
    if quote == at or buffer[end - 1] != 0x5C:
        return end
    rest = _STRING_REST.match(buffer, at)  # the same in one pass, whatever it holds, at a tenth of the speed
    assert rest is not None
    return rest.end()
