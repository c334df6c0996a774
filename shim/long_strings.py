"""Long strings of base64 in a JSON body, decoded before it is parsed: json's parser goes through a picture of 10 MB one
character after the other, and lets no other thread run meanwhile, which holds up every stream of the process.

    {"data": "iVBORw0KGgo… 12 MB …"}   becomes   {"data": "<name>0"}, and bytes beside it

Owns how such strings are found. What is left is parsed as ever, and `put_back` gives them their places in the value.
Everything here is done in steps of less than a millisecond. Knows no field but by the keys that it is told.
"""

from __future__ import annotations

import binascii
import re
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

LEAST_BYTES = 64 << 10  # all strings of so many are found, and some of half as many
_WINDOW = LEAST_BYTES // 2
_SLICE_CHARS = 128 << 10  # of base64 that are decoded at one time: a quarter of a millisecond
_HEAD = re.compile(rb"data:[\w/.+=;%-]{0,200},", re.ASCII | re.IGNORECASE)
_NAME = secrets.token_hex(16)  # nobody else can write a string that begins so


@dataclass(frozen=True, slots=True)
class LongString:
    """A string of a body: `head`, which is empty or that of a data: URL, and the base64 (RFC 4648) of `data`."""

    head: str
    data: bytes

    @property
    def text(self) -> str:
        """The string itself."""
        return self.head + binascii.b2a_base64(self.data, newline=False).decode()


def cut(body: bytes) -> tuple[bytes, list[LongString]]:
    """The body without its long strings, names in their places; the body itself where there are none."""
    pieces: list[bytes | memoryview] = []
    found: list[LongString] = []
    view, done = memoryview(body), 0
    for start, end in _stretches(body):
        string = _decoded(view, start, end)
        if string is not None:
            pieces += (view[done:start], f"{_NAME}{len(found)}".encode())
            found.append(string)
            done = end
    return (b"".join([*pieces, view[done:]]), found) if found else (body, found)


def put_back(value: Any, strings: list[LongString], keep: Collection[str]) -> Any:
    """The value of a body that was cut, with its strings: as `LongString` where they stand under a key of `keep`, else
    as they were."""
    if isinstance(value, str):
        return _named(value, strings).text if value.startswith(_NAME) else value
    if isinstance(value, list):
        return [put_back(item, strings, keep) for item in value]
    if not isinstance(value, dict):
        return value
    whole = {}
    for key, item in value.items():
        if isinstance(item, str) and item.startswith(_NAME) and key in keep:
            whole[key] = _named(item, strings)
        else:
            whole[put_back(key, strings, keep)] = put_back(item, strings, keep)
    return whole


def _named(name: str, strings: list[LongString]) -> LongString:
    return strings[int(name.removeprefix(_NAME))]


def _stretches(body: bytes) -> Iterator[tuple[int, int]]:
    """First and end of what stands between two quotes that are far from each other.

    What is not within a string can't be base64: there would have to be a colon or a comma.
    """
    at = _WINDOW
    while at < len(body):
        if body.find(b'"', at - _WINDOW, at) >= 0:
            at += _WINDOW
            continue
        opening, closing = body.rfind(b'"', max(0, at - 2 * _WINDOW), at - _WINDOW), body.find(b'"', at)
        if closing < 0:
            return
        if opening >= 0 and body[opening - 1 : opening] != b"\\":  # else the string has begun before
            yield opening + 1, closing
        at = closing + _WINDOW


def _decoded(view: memoryview, start: int, end: int) -> LongString | None:
    """None where it is anything else than base64 as an encoder writes it."""
    head = _HEAD.match(view[start : min(start + 256, end)])
    first = start if head is None else start + head.end()
    pieces = []
    try:
        for at in range(first, end, _SLICE_CHARS):
            last = min(at + _SLICE_CHARS, end)
            pieces.append(binascii.a2b_base64(view[at:last], strict_mode=True))
            if last < end and len(pieces[-1]) != _SLICE_CHARS // 4 * 3:
                return None  # its padding is not at the end
    except ValueError:  # binascii.Error is one
        return None
    if pieces and pieces[-1] and not _is_canonical(view[max(first, end - 4) : end], pieces[-1]):
        return None
    return LongString("" if head is None else head[0].decode(), b"".join(pieces))


def _is_canonical(last: memoryview, piece: bytes) -> bool:
    """Whether the last four characters are what these bytes are written as: two forms can stand for the same."""
    return binascii.b2a_base64(piece[-1 - (len(piece) - 1) % 3 :], newline=False) == bytes(last)
