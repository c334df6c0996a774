"""Numbers within bounds, as expressions over their digits.

A bounded number has no exponent. Its digits are split where the bounds cut: an interval that lies wholly inside may go
on with any digits, one that is cut is taken apart digit by digit, one place further than the bounds themselves go. Near
a bound it has at most 15 digits: so many tell two doubles apart, and whoever reads it as one finds it on its side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from aiexport_edge.engine.structured.expressions import Expression, Lexeme, Repeat, Text, alt, chars, maybe, seq
from aiexport_edge.engine.structured.json_grammar import (
    FRACTION,
    INTEGER,
    MAX_INTEGER_DIGITS,
    NUMBER,
)

_DIGITS = "0123456789"
_LARGEST = 10**MAX_INTEGER_DIGITS - 1
MAX_BOUND_PLACES = 6
_MAX_DIGITS = 15  # of a number near a bound
_MAX_WHOLE_DIGITS = _MAX_DIGITS - MAX_BOUND_PLACES  # of one that may go on after its point


@dataclass(frozen=True, slots=True)
class Bounds:
    """low … high; None is open. Strict ones exclude the bound itself."""

    low: Fraction | None = None
    high: Fraction | None = None
    low_strict: bool = False
    high_strict: bool = False

    def has(self, value: Fraction) -> bool:
        """Whether a number is within."""
        above = self.low is None or (value > self.low if self.low_strict else value >= self.low)
        below = self.high is None or (value < self.high if self.high_strict else value <= self.high)
        return above and below

    def negated(self) -> Bounds:
        """Of -x where these are of x."""
        return Bounds(
            None if self.high is None else -self.high,
            None if self.low is None else -self.low,
            self.high_strict,
            self.low_strict,
        )


def integer(bounds: Bounds) -> Expression | None:
    """Integers within; None where there are none."""
    if bounds.low is None and bounds.high is None:
        return INTEGER
    low = -_LARGEST if bounds.low is None else -((-bounds.low) // 1)
    high = _LARGEST if bounds.high is None else bounds.high // 1
    low += bounds.low_strict and low == bounds.low
    high -= bounds.high_strict and high == bounds.high
    low, high = max(low, -_LARGEST), min(high, _LARGEST)
    options: list[Expression] = []
    if low < 0 and low <= high:
        options.append(seq(Text("-"), _natural(max(1, -high), -low)))
    if high >= 0 and low <= high:
        options.append(_natural(max(0, low), high))
    return Lexeme(alt(options)) if options else None


@lru_cache(maxsize=256)
def number(bounds: Bounds) -> Expression | None:
    """Numbers within; None where there are none. Raises ValueError for a bound with too many places."""
    if bounds.low is None and bounds.high is None:
        return NUMBER
    options = _decimals(bounds)
    options += [seq(Text("-"), option) for option in _decimals(bounds.negated(), negative=True)]
    return Lexeme(alt(options)) if options else None


def _natural(low: int, high: int) -> Expression:
    """Integers from low to high, both at least 0, without leading zeros."""
    options: list[Expression] = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (length - 1) if length > 1 else 0)
        last = min(high, 10**length - 1)
        options.append(_same_length(str(first), str(last)))
    return alt(options)


def _same_length(low: str, high: str) -> Expression:
    """Strings of digits from low to high, all of one length."""
    if low == high:
        return Text(low)
    size = len(low)
    if set(low) == {"0"} and set(high) == {"9"}:
        return Repeat(chars(_DIGITS), size, size)
    if low[0] == high[0]:
        return seq(Text(low[0]), _same_length(low[1:], high[1:]))
    if size == 1:
        return chars((ord(low), ord(high)))
    options: list[Expression] = []
    start, stop = int(low[0]), int(high[0])
    if set(low[1:]) != {"0"}:
        options.append(seq(Text(low[0]), _same_length(low[1:], "9" * (size - 1))))
        start += 1
    whole_last = set(high[1:]) == {"9"}
    last = stop if whole_last else stop - 1
    if start <= last:
        options.append(seq(chars((ord(str(start)), ord(str(last)))), Repeat(chars(_DIGITS), size - 1, size - 1)))
    if not whole_last:
        options.append(seq(Text(high[0]), _same_length("0" * (size - 1), high[1:])))
    return alt(options)


def _decimals(bounds: Bounds, *, negative: bool = False) -> list[Expression]:
    """Numbers of at least 0 within, without sign; above 0 alone where a minus goes before."""
    if bounds.high is not None and (bounds.high < 0 or (bounds.high == 0 and bounds.high_strict)):
        return []
    if bounds.low is None or bounds.low < 0:
        bounds = replace(bounds, low=Fraction(0), low_strict=False)
    if negative and bounds.low == 0:
        bounds = replace(bounds, low_strict=True)
    assert bounds.low is not None
    places = 0
    for bound in (bounds.low, bounds.high or Fraction(0)):
        own = _places(bound)
        if own > MAX_BOUND_PLACES:
            raise ValueError(f"a bound has more than {MAX_BOUND_PLACES} decimal places")
        if own and len(str(bound // 1)) + own > _MAX_DIGITS:
            raise ValueError(f"a bound has more than {_MAX_DIGITS} digits")
        places = max(places, own)
    options: list[Expression] = []
    first, last = bounds.low // 1, _LARGEST if bounds.high is None else min(bounds.high // 1, _LARGEST)
    inside_first = first if bounds.has(Fraction(first)) else first + 1
    inside_last = last if bounds.high is None else last - 1  # n with [n, n + 1) wholly inside
    if bounds.high is None:
        if inside_first <= inside_last:
            whole = _natural(inside_first, inside_last)
            options.append(seq(whole, maybe(FRACTION)) if bounds.low < 10**_MAX_DIGITS else whole)
    else:
        most = min(inside_last, 10**_MAX_WHOLE_DIGITS - 1)
        if inside_first <= most:
            options.append(_with_fraction(_natural(inside_first, most), len(str(most))))
        if max(inside_first, most + 1) <= inside_last:
            options.append(_natural(max(inside_first, most + 1), inside_last))
    for edge in sorted({first, last}):
        if edge <= _LARGEST and not inside_first <= edge <= inside_last:
            options += _cut(str(edge), Fraction(edge), Fraction(1), places + 1, bounds)
    return options


def _cut(text: str, value: Fraction, unit: Fraction, places: int, bounds: Bounds) -> list[Expression]:
    """What begins with `text`, whose value is `value`, of the numbers in [value, value + unit) that are within."""
    if not (bounds.high is None or value <= bounds.high) or (bounds.low is not None and value + unit <= bounds.low):
        return []
    has_point = unit < 1
    used = len(text.partition(".")[2])
    left = _MAX_DIGITS - len(text.partition(".")[0]) - used
    whole = bounds.has(value) and (bounds.high is None or value + unit <= bounds.high)
    if whole:
        if has_point:
            return [seq(Text(text), Repeat(chars(_DIGITS), 0, max(0, left)))]
        return [_with_fraction(Text(text), len(text))]
    if bounds.low_strict and value == bounds.low and (bounds.high is None or value + unit <= bounds.high):
        return [_beyond(text if has_point else f"{text}.", left)] if left > 0 else []
    options: list[Expression] = [Text(text)] if bounds.has(value) else []
    if places and left > 0:
        for digit in range(10):
            longer = f"{text}{'' if has_point else '.'}{digit}"
            options += _cut(longer, value + digit * unit / 10, unit / 10, places - 1, bounds)
    return options


def _with_fraction(whole: Expression, num_digits: int) -> Expression:
    """`whole`, which has up to `num_digits`, and perhaps a fraction."""
    left = _MAX_DIGITS - num_digits
    return seq(whole, maybe(seq(Text("."), Repeat(chars(_DIGITS), 1, left)))) if left > 0 else whole


def _beyond(text: str, left: int) -> Expression:
    """What begins with `text`, which has a point, and is more than it: up to `left` digits that are not all zero."""
    zeros = (left - 1) // 2
    digits = Repeat(chars(_DIGITS), 0, left - 1 - zeros)
    return seq(Text(text), Repeat(chars("0"), 0, zeros), chars("123456789"), digits)


def _places(value: Fraction) -> int:
    """Decimal places of a number that has finitely many."""
    places = 0
    while value.denominator != 1 and places <= MAX_BOUND_PLACES:
        value, places = value * 10, places + 1
    return places
