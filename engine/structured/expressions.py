"""What a grammar is made of: expressions over characters, in named rules that may call each other.

One definition serves two readers: `automaton.py` follows a document through it byte by byte and knows the shortest way
to its end; `lark.py` writes it down for the library that masks tokens. Knows neither JSON nor tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

MAX_CODE_POINT = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True, slots=True)
class Text:
    """These characters."""

    text: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One character of these ranges of code points, inclusive, sorted and apart."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Seq:
    """One after the other."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of these; at least one."""

    options: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """At least `least` times, at most `most` (None: any number)."""

    part: Expression
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Call:
    """What the rule of this name is."""

    rule: str


@dataclass(frozen=True, slots=True)
class Except:
    """What `whole` has besides `texts`; a whole lexeme. `spelled_out` is the same without the exception."""

    whole: Expression
    texts: tuple[str, ...]
    spelled_out: Expression


@dataclass(frozen=True, slots=True)
class Lexeme:
    """A part without recursion that stands on its own in the text: a bracket, a string, a number."""

    part: Expression


Expression: TypeAlias = Text | Chars | Seq | Alt | Repeat | Call | Except | Lexeme


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules by name. The document is `start`. Rules whose names are upper case are parts of lexemes."""

    rules: dict[str, Expression]
    start: str


def seq(*parts: Expression) -> Expression:
    """One after the other."""
    return parts[0] if len(parts) == 1 else Seq(parts)


def alt(options: Iterable[Expression]) -> Expression:
    """One of these, equal ones once."""
    unique = tuple(dict.fromkeys(options))
    assert unique, "an alternative needs an option"
    return unique[0] if len(unique) == 1 else Alt(unique)


def maybe(part: Expression) -> Expression:
    """Once or not at all."""
    return Repeat(part, 0, 1)


def chars(*ranges: tuple[int, int] | str) -> Chars:
    """A character of any of these ranges (inclusive) or strings."""
    pairs: list[tuple[int, int]] = []
    for entry in ranges:
        pairs += [(ord(c), ord(c)) for c in entry] if isinstance(entry, str) else [entry]
    return Chars(_normal(pairs))


def without(characters: Chars, removed: Chars) -> Chars:
    """The characters that are in the first and not in the second."""
    left: list[tuple[int, int]] = []
    for low, high in characters.ranges:
        start = low
        for gap_low, gap_high in removed.ranges:
            if gap_high < start or gap_low > high:
                continue
            if gap_low > start:
                left.append((start, gap_low - 1))
            start = gap_high + 1
        if start <= high:
            left.append((start, high))
    return Chars(_normal(left))


def common(one: Chars, other: Chars) -> Chars:
    """The characters in both."""
    return without(one, without(ANY, other))


def _normal(pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


# Every character that UTF-8 can hold.
ANY = Chars(((0, _SURROGATES[0] - 1), (_SURROGATES[1] + 1, MAX_CODE_POINT)))
