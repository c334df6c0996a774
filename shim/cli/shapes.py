"""The shape of a reply: what a client's code depends on, without the values.

A shape maps paths to sets of kinds. A path is made of the keys down to a value (`body.usage.input_tokens`); an array's
elements share one (`body.content[text].text`: those whose `type` is "text"). A kind is a JSON type, or for keys named
`type`, which tell shapes apart, the value itself in quotes. Two shapes differ where a path is on one side alone, or its
kinds are others; what an empty array would hold is unknown, and no difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

ABSENT = "absent"
_HEADERS = ("request-id", "x-request-id", "retry-after", "x-should-retry")
_MAX_SHOWN = 120  # characters

Shape = dict[str, set[str]]


@dataclass(frozen=True, slots=True)
class Difference:
    """What one server replies at a path and what the other does, in words."""

    path: str
    here: str
    there: str


def shape_of(value: Any, path: str) -> Shape:
    """The shape of a JSON value, its own kind under `path`."""
    shape: Shape = {}
    stack = [(path, value)]
    while stack:
        where, item = stack.pop()
        shape.setdefault(where, set()).add(_kind(item))
        if isinstance(item, dict):
            for key, inner in item.items():
                below = f"{where}.{shown(key)}"
                if key == "type" and isinstance(inner, str):
                    shape.setdefault(below, set()).add(f'"{shown(inner)}"')
                else:
                    stack.append((below, inner))
        elif isinstance(item, list):
            stack.extend((f"{where}[{_element(inner)}]", inner) for inner in item)
    return shape


def _element(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return shown(kind) if isinstance(kind, str) else ""


def _kind(item: Any) -> str:
    if item is None:
        return "null"
    if isinstance(item, bool):
        return "boolean"
    if isinstance(item, int | float):
        return "number"
    if isinstance(item, str):
        return "string"
    return "object" if isinstance(item, dict) else "array"


def shown(text: str) -> str:
    """A server's text as it can be printed: one line, without control characters, not too long."""
    plain = "".join(character if character.isprintable() else "�" for character in text)
    return plain if len(plain) <= _MAX_SHOWN else plain[:_MAX_SHOWN] + "…"


def merged(shapes: Iterable[Shape]) -> Shape:
    whole: Shape = {}
    for shape in shapes:
        for path, kinds in shape.items():
            whole.setdefault(path, set()).update(kinds)
    return whole


def header_names(headers: Iterable[tuple[str, str]]) -> set[str]:
    """Those that clients act on, in lower case."""
    return {name for name, _ in headers if name in _HEADERS or "ratelimit" in name}


def media_type(content_type: str) -> str:
    return shown(content_type.partition(";")[0].strip().lower()) or ABSENT


def differences(here: Mapping[str, set[str]], there: Mapping[str, set[str]]) -> Iterator[Difference]:
    """By path. Below a path that differs in whether it is there or holds anything, nothing more is said."""
    told: list[str] = []
    for path in sorted(here.keys() | there.keys()):
        if any(path.startswith((above + ".", above + "[")) for above in told):
            continue
        mine, theirs = here.get(path), there.get(path)
        if mine == theirs:
            continue
        if mine is None or theirs is None:
            parent = path.rpartition("[")[0] if path.endswith("]") else ""
            if parent and not _elements(here if mine is None else there, parent):
                told.append(path)  # an empty array on that side
                continue
        if mine is None or theirs is None or ("object" in mine | theirs or "array" in mine | theirs):
            told.append(path)
        yield Difference(path, _words(mine), _words(theirs))


def _elements(shape: Mapping[str, set[str]], array: str) -> bool:
    return any(path.startswith(array + "[") for path in shape)


def _words(kinds: set[str] | None) -> str:
    return " or ".join(sorted(kinds)) if kinds else ABSENT


def sequence(names: Iterable[str]) -> tuple[str, ...]:
    """The order of a stream's events. Repeats are one, and pings left out: how many come depends on the pace."""
    return tuple(name for name, _ in groupby(shown(name) for name in names if name != "ping"))
