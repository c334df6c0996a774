"""Reads JSON objects field by field, and names the field that is wrong.

Owns the rules that hold for every field of every request: null is absent, `true` is not an integer, `1.0` is one, an
unknown field is ignored. Knows no particular field. A path is written `messages.0.content.1.source.media_type`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from aiexport_edge.shim.errors import InvalidRequest, quoted
from aiexport_edge.shim.long_strings import LongString

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Value:
    """A value that is there (never null), and where it is."""

    raw: Any
    path: str

    def wrong(self, problem: str) -> InvalidRequest:
        """An error that names this field: `problem` reads on after its path."""
        where = self.path or "The request body"
        return InvalidRequest(f"{where}: {problem}" if self.path else f"{where} {problem}", param=self.path or None)

    def object(self) -> Object:
        if not isinstance(self.raw, dict):
            raise self.wrong(f"must be an object, not {_kind(self.raw)}")
        return Object(self.raw, self.path)

    def array(self) -> list[Any]:
        if not isinstance(self.raw, list):
            raise self.wrong(f"must be an array, not {_kind(self.raw)}")
        return self.raw

    def items(self) -> Iterator[Value]:
        """The elements of an array; null is not one that can be left out."""
        for index, raw in enumerate(self.array()):
            yield Value(raw, f"{self.path}.{index}")

    def boolean(self) -> bool:
        if not isinstance(self.raw, bool):
            raise self.wrong(f"must be true or false, not {_kind(self.raw)}")
        return self.raw

    def text(self) -> str:
        """A string that can go on to a model: one that UTF-8 can hold."""
        if isinstance(self.raw, LongString):
            return self.raw.text
        if not isinstance(self.raw, str):
            raise self.wrong(f"must be a string, not {_kind(self.raw)}")
        try:
            self.raw.encode("utf-8")
        except UnicodeEncodeError as error:
            raise self.wrong(f"holds a lone surrogate at character {error.start}, which is no text") from None
        return self.raw

    def choice(self, *choices: str) -> str:
        text = self.text()
        if text not in choices:
            raise self.wrong(f"must be {_either(choices)}, not {quoted(text)}")
        return text

    def integer(self, low: int, high: int | None = None) -> int:
        """A whole number from `low` to `high`, both included; `1.0` is one."""
        raw = self.raw
        if isinstance(raw, bool) or not isinstance(raw, int | float):
            raise self.wrong(f"must be an integer, not {_kind(raw)}")
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        if raw in (float("inf"), float("-inf")):
            raise self.wrong(f"must be {limits}")
        if raw != int(raw):
            raise self.wrong(f"must be an integer, not {raw}")
        if raw < low or (high is not None and raw > high):
            raise self.wrong(f"must be {limits}")
        return int(raw)

    def number(self, allowed: Callable[[float], bool], rule: str) -> float:
        """A number for which `allowed` holds; `rule` reads on after "must be"."""
        raw = self.raw
        if isinstance(raw, bool) or not isinstance(raw, int | float):
            raise self.wrong(f"must be a number, not {_kind(raw)}")
        if not allowed(raw):
            raise self.wrong(f"must be {rule}")
        return float(raw)


@dataclass(frozen=True, slots=True)
class Object:
    """A JSON object, and where it is."""

    raw: dict[str, Any]
    path: str

    def path_of(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def get(self, name: str) -> Value | None:
        """The field, or None where it is absent or null."""
        raw = self.raw.get(name)
        return None if raw is None else Value(raw, self.path_of(name))

    def require(self, name: str) -> Value:
        """The field; raises `InvalidRequest` where it is absent or null."""
        value = self.get(name)
        if value is None:
            raise InvalidRequest(f"{self.path_of(name)}: this field is required", param=self.path_of(name))
        return value

    def read(self, name: str, read: Callable[[Value], T]) -> T | None:
        """`read` applied to the field, or None where it is absent."""
        value = self.get(name)
        return None if value is None else read(value)


def _kind(raw: object) -> str:
    """The JSON name of a value's type, with its article."""
    if raw is None:
        return "null"
    if isinstance(raw, bool):
        return "a boolean"
    kinds: tuple[tuple[Any, str], ...] = (
        (int | float, "a number"),
        (str | LongString, "a string"),
        (list, "an array"),
        (dict, "an object"),
    )
    return next(name for kind, name in kinds if isinstance(raw, kind))


def _either(choices: tuple[str, ...]) -> str:
    names = [f'"{choice}"' for choice in choices]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]
