"""One table of the configuration file while it is read, and the error that says what is wrong there, with the line.

Knows how TOML is laid out, and no key of the product.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from aiexport_edge.proto import config_values as values

T = TypeVar("T")

_PART = r"""[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*'"""
_DOTTED = rf"(?:{_PART})(?:\s*\.\s*(?:{_PART}))*"
_HEADER = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]")
_KEY = re.compile(rf"\s*({_DOTTED})\s*=")


class ConfigError(Exception):
    """What is wrong with the configuration, where, and what to do: one sentence for a person."""

    def __init__(self, file: Path | None, key: str, problem: str) -> None:
        self.file = file
        self.key = key
        self.problem = problem
        where = "configuration" if file is None else str(file)
        line = None if file is None else _line_in(file, key)
        if line is not None:
            where += f":{line}"
        super().__init__(": ".join(part for part in (where, key, problem) if part))


class Table:
    """`take` each key that may be there, then `end`, which refuses all others."""

    def __init__(self, file: Path | None, path: str, raw: dict[str, Any]) -> None:
        self.file = file
        self.path = path
        self._raw = raw
        self._known: list[str] = []

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(self.file, f"{self.path}.{key}" if self.path else key, problem)

    def take(self, key: str, parse: Callable[[Any], T], default: T) -> T:
        """The value of `key`, read by `parse`, whose `ValueError` is a phrase that reads on after the key."""
        self._known.append(key)
        if key not in self._raw:
            return default
        try:
            return parse(self._raw[key])
        except ValueError as problem:
            raise self.error(key, str(problem)) from None

    @property
    def is_empty(self) -> bool:
        return not self._raw

    def table(self, key: str) -> Table:
        empty: dict[str, Any] = {}
        raw = self.take(key, values.table, empty)
        return Table(self.file, f"{self.path}.{key}" if self.path else key, raw)

    def end(self) -> None:
        for key in self._raw:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, n=1, cutoff=0.5)
                known = f'did you mean "{near[0]}"?' if near else f"known here: {', '.join(self._known)}"
                raise self.error(key, f"unknown key; {known}")


# ---------------------------------------------------------------------------------------------------- lines


def _line_in(file: Path, key: str) -> int | None:
    try:
        return line_of(file.read_text(encoding="utf-8-sig"), key)
    except (OSError, UnicodeDecodeError):
        return None


def line_of(text: str, key: str) -> int | None:
    """On which line of a TOML file `key` is ("models.1.source"), else the table that it is missing in. None: neither.

    TOML's own parser does not say. Entries of an array of tables are counted from 0.
    """
    wanted = key.split(".")
    best, found = 0, None
    for line, path in _said(text):
        shared = len(path) if path == wanted[: len(path)] else 0
        if shared > best:
            best, found = shared, line
    return found


def _said(text: str) -> Iterator[tuple[int, list[str]]]:
    """The line and the whole path of every header and of every key, but for those in values of several lines."""
    table: list[str] = []
    num_entries: dict[str, int] = {}
    quotes = ""  # that end the text of several lines that we are in
    for number, line in enumerate(text.splitlines(), 1):
        if not quotes:
            if header := _HEADER.match(line):
                table = _in_arrays(_parts(header[2]), num_entries, begins=header[1] == "[[")
                yield number, table
            elif assigned := _KEY.match(line):
                yield number, [*table, *_parts(assigned[1])]
        for mark in re.findall(r'"""|\'\'\'', line):
            quotes = "" if mark == quotes else quotes or mark


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_PART, dotted)]


def _in_arrays(parts: list[str], num_entries: dict[str, int], *, begins: bool) -> list[str]:
    """A header's path with the number of the entry behind each name of an array of tables."""
    path: list[str] = []
    for depth, part in enumerate(parts, 1):
        path.append(part)
        name = ".".join(path)
        if begins and depth == len(parts):
            num_entries[name] = num_entries.get(name, -1) + 1
        if name in num_entries:
            path.append(str(num_entries[name]))
    return path
