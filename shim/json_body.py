"""A request body as JSON: what declares itself as JSON, how it is parsed, and what no parser may be asked to build.

Survives any bytes: each ends as a Python value or as `InvalidRequest`. RFC 8259, strictly: no NaN, no comments, no
byte order mark, nothing after the document; duplicate keys are allowed and the last one wins; lone surrogates are
allowed here (`fields.py` refuses them where text goes on to a model). Knows no field, but where pictures are.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import NoReturn, TypeAlias

from aiexport_edge.shim import long_strings
from aiexport_edge.shim.errors import InvalidRequest, UnsupportedMediaType
from aiexport_edge.shim.long_strings import LongString

JsonValue: TypeAlias = "bool | int | float | str | LongString | list[JsonValue] | dict[str, JsonValue] | None"

MAX_VALUES = 250_000  # a body of 32 MiB can spell 11 million empty objects, which is 700 MB once parsed
MAX_DEPTH = 200  # what the messages API allows has six levels
PICTURE_KEYS = ("data", "url")  # under which a long string of base64 comes decoded
MAX_INTEGER_DIGITS = 400  # longer ones are out of any field's range, and `int` is quadratic
_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[][{}]', re.DOTALL)  # possessive: no backtracking


def require_json(content_type: bytes | None, content_encoding: bytes | None) -> None:
    """Raises `UnsupportedMediaType` for a declared document other than JSON. No declaration and text/plain are JSON."""
    if content_encoding is not None and content_encoding.strip().lower() not in (b"", b"identity"):
        raise UnsupportedMediaType("Compressed request bodies are not supported; send the JSON as it is.")
    if content_type is None:
        return
    media_type = content_type.partition(b";")[0].strip().lower()
    if media_type in (b"", b"application/json", b"text/plain", b"text/json") or media_type.endswith(b"+json"):
        return
    raise UnsupportedMediaType('The request body must be JSON; send it with "Content-Type: application/json".')


def parse(body: bytes) -> JsonValue:
    """The value that `body` spells. Integers of more than `MAX_INTEGER_DIGITS` digits come back as an infinite float,
    base64 of `LEAST_BYTES` or more under `PICTURE_KEYS` as a `LongString`.

    Raises `InvalidRequest` for anything else.
    """
    if len(body) >= long_strings.LEAST_BYTES:
        shorter, strings = long_strings.cut(body)
        if strings:
            with contextlib.suppress(InvalidRequest):  # which would name places of what is left
                value: JsonValue = long_strings.put_back(_parse(shorter), strings, PICTURE_KEYS)
                return value
    return _parse(body)


def _parse(body: bytes) -> JsonValue:
    if not body.strip(b" \t\r\n"):
        raise InvalidRequest("The request body is empty; it must be a JSON object.")
    _check_structure(body)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The request body is not valid UTF-8 (at byte {error.start}).") from None
    try:
        value: JsonValue = _DECODER.decode(_without_mark(text))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidRequest(f"The request body is not valid JSON: {error.msg} ({where}).") from None
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply.") from None
    return value


def _without_mark(text: str) -> str:
    if text.startswith("\ufeff"):
        raise InvalidRequest("The request body starts with a byte order mark, which JSON does not allow.")
    return text


def _check_structure(body: bytes) -> None:
    """Bounds depth and number of values before any is built.

    A value but the first follows one of `[ { , :`. Most bodies have so few of them that counting bytes settles it; else
    what stands in strings is told apart from what does not.
    """
    num_openings = body.count(b"[") + body.count(b"{")
    if num_openings <= MAX_DEPTH and num_openings + body.count(b",") + body.count(b":") <= MAX_VALUES:
        return
    depth = num_marks = num_pieces = end = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        start = match.start()
        num_pieces += 1
        num_marks += body.count(b",", end, start) + body.count(b":", end, start)
        end = match.end()
        first = body[start]
        if first in b"[{":
            num_marks += 1
            depth += 1
        elif first in b"]}":
            depth -= 1
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"The request body is nested more than {MAX_DEPTH} levels deep.")
        if num_marks > MAX_VALUES or num_pieces > 3 * MAX_VALUES:  # a value has a key and two brackets at most
            break
    else:
        num_marks += body.count(b",", end) + body.count(b":", end)
    if num_marks > MAX_VALUES or num_pieces > 3 * MAX_VALUES:
        raise InvalidRequest(f"The request body holds more than {MAX_VALUES:,} JSON values.")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_INTEGER_DIGITS else float(digits)


def _constant(name: str) -> NoReturn:
    raise InvalidRequest(f"The request body is not valid JSON: {name} is not a JSON value.")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_constant=_constant)
