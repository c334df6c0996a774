"""Regular expressions of a schema's `pattern` (ECMA-262) as expressions over the characters of a JSON string.

Known: characters, `.`, classes, `\\d \\w \\s` and their complements, escapes, groups, `|`, the quantifiers `* + ? {n}
{n,} {n,m}`, `^` at the beginning and `$` at the end. Not known: back references, lookaround, word borders, properties,
flags. A pattern without `^` or `$` may begin or end anywhere in the string.
"""

from __future__ import annotations

from aiexport_edge.engine.structured.expressions import (
    ANY,
    Chars,
    Expression,
    Repeat,
    Seq,
    alt,
    chars,
    common,
    seq,
    without,
)
from aiexport_edge.engine.structured.json_grammar import string_char

MAX_REPEAT = 1000
MAX_GROUPS = 50

_ASCII = chars((0, 0x7F))
_SPACES = chars("\t\n\x0b\f\r \xa0\u1680\u2028\u2029\u202f\u205f\u3000", (0x2000, 0x200A))
_WORD = chars((48, 57), (65, 90), "_", (97, 122))
# Where ECMA-262 and Python differ about a character, it belongs neither to a class nor to its complement.
_CLASSES = {
    "d": chars("0123456789"),
    "D": without(_ASCII, chars("0123456789")),
    "w": _WORD,
    "W": without(_ASCII, _WORD),
    "s": _SPACES,
    "S": without(without(ANY, _SPACES), chars("\x1c\x1d\x1e\x1f\x85\ufeff")),
}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\x0b", "0": "\0"}
_NEWLINES = chars("\n\r\u2028\u2029")
_SYNTAX = "^$\\.*+?()[]{}|/"


class UnknownPattern(Exception):
    """What of a pattern is not known here."""


def pattern_text(pattern: str) -> Expression:
    """What stands between the quotes of a string that matches. Raises `UnknownPattern`."""
    return _Parser(pattern).read()


class _Parser:
    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._place = 0
        self._depth = 0

    def read(self) -> Expression:
        anything = Repeat(string_char(ANY), 0, None)
        options: list[Expression] = []
        while True:
            anchored = self._take("^")
            parts = self._branch()
            ends = self._take("$")
            options.append(seq(*([] if anchored else [anything]), *parts, *([] if ends else [anything])))
            if not self._take("|"):
                break
        if self._place < len(self._pattern):
            raise UnknownPattern(f"{self._pattern[self._place]!r} at place {self._place}")
        # `^a|b$` anchors each branch alone, as here; a `^` or `$` elsewhere is refused by `_atom`.
        return alt(options)

    def _peek(self) -> str:
        return self._pattern[self._place] if self._place < len(self._pattern) else ""

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._place)
        self._place += len(text) * found
        return found

    def _branch(self) -> list[Expression]:
        parts: list[Expression] = []
        while self._peek() not in ("", "|", ")", "$"):
            parts.append(self._quantified())
        return parts

    def _quantified(self) -> Expression:
        atom = self._atom()
        while True:
            match self._peek():
                case "*":
                    least, most = 0, None
                case "+":
                    least, most = 1, None
                case "?":
                    least, most = 0, 1
                case "{":
                    counts = self._counts()
                    if counts is None:
                        raise UnknownPattern("a brace that is no quantifier")
                    least, most = counts
                    self._place -= 1
                case _:
                    return atom
            self._place += 1
            self._take("?")  # lazy or not: the same strings match
            if max(least, most or 0) > MAX_REPEAT:
                raise UnknownPattern(f"a repetition of more than {MAX_REPEAT}")
            atom = Repeat(atom, least, most)

    def _counts(self) -> tuple[int, int | None] | None:
        end = self._pattern.find("}", self._place)
        low, comma, high = self._pattern[self._place + 1 : end].partition(",")
        if end < 0 or not low.isdecimal() or len(low) > 6 or (high and not high.isdecimal()) or len(high) > 6:
            return None
        self._place = end + 1
        least = int(low)
        most = least if not comma else int(high) if high else None
        if most is not None and most < least:
            raise UnknownPattern("a quantifier whose numbers are out of order")
        return least, most

    def _atom(self) -> Expression:
        character = self._peek()
        if character == "(":
            return self._group()
        if character == "[":
            return string_char(self._class())
        self._place += 1
        if character == ".":
            return string_char(without(ANY, _NEWLINES))
        if character == "\\":
            return string_char(self._escape())
        if character in "^$*+?":
            raise UnknownPattern(f"{character!r} at place {self._place - 1}")
        return string_char(_one(character))

    def _group(self) -> Expression:
        self._depth += 1
        if self._depth > MAX_GROUPS:
            raise UnknownPattern(f"groups nested more than {MAX_GROUPS} deep")
        self._place += 1
        if self._take("?") and not self._take(":"):
            if not self._take("<") or self._peek() in ("=", "!", ""):
                raise UnknownPattern("a group of a special kind")
            self._place = self._pattern.find(">", self._place) + 1 or len(self._pattern)
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        if not self._take(")"):
            raise UnknownPattern("a group without its end" if not self._peek() else "an anchor inside a group")
        self._depth -= 1
        return alt(options)

    def _sequence(self) -> Expression:
        parts = self._branch()
        return seq(*parts) if parts else Seq(())

    def _class(self) -> Chars:
        self._place += 1
        inverted = self._take("^")
        pairs: list[tuple[int, int]] = []
        named = False  # it names a class, about whose complement beyond ASCII there is no agreement
        while not self._take("]"):
            named = named or (self._peek() == "\\" and self._pattern[self._place + 1 : self._place + 2] in set("dws"))
            low = self._member()
            if self._peek() == "-" and self._pattern[self._place + 1 : self._place + 2] not in ("]", ""):
                self._place += 1
                high = self._member()
                if len(low.ranges) != 1 or len(high.ranges) != 1 or low.ranges[0][0] > high.ranges[0][1]:
                    raise UnknownPattern("a range in a class that has no order")
                pairs.append((low.ranges[0][0], high.ranges[0][1]))
            else:
                pairs += low.ranges
        found = common(chars(*pairs), ANY)
        if inverted:
            found = without(_ASCII if named else ANY, found)
        if not found.ranges:
            raise UnknownPattern("a class without characters")
        return found

    def _member(self) -> Chars:
        character = self._peek()
        if not character:
            raise UnknownPattern("a class without its end")
        self._place += 1
        if character != "\\":
            return _one(character)
        if self._peek() == "b":
            self._place += 1
            return chars("\b")
        return self._escape()

    def _escape(self) -> Chars:
        character = self._peek()
        self._place += 1
        if character in _CLASSES:
            return _CLASSES[character]
        if character in _CONTROLS:
            if character == "0" and self._peek().isdecimal():
                raise UnknownPattern("an octal escape")
            return chars(_CONTROLS[character])
        for letter, size in (("x", 2), ("u", 4)):
            if character == letter:
                digits = self._pattern[self._place : self._place + size]
                if len(digits) < size or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
                    break
                self._place += size
                return _one(chr(int(digits, 16)))
        if character and (character in _SYNTAX or not (character.isalnum() or character == "_")):
            return _one(character)
        raise UnknownPattern(f"the escape \\{character}")


def _one(character: str) -> Chars:
    if 0xD800 <= ord(character) <= 0xDFFF:
        raise UnknownPattern("half of a surrogate pair")
    return chars(character)
