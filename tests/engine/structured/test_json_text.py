"""JSON itself: what the grammar has is JSON, and of JSON it lacks only what it says it lacks."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiexport_edge.engine.structured import numbers
from aiexport_edge.engine.structured.automaton import Automaton
from aiexport_edge.engine.structured.document import Reader
from aiexport_edge.engine.structured.expressions import MAX_CODE_POINT, Expression, Grammar
from aiexport_edge.engine.structured.json_grammar import JSON_OBJECT, RULES
from aiexport_edge.engine.structured.prefix import document_prefix
from aiexport_edge.engine.structured.utf8 import byte_ranges

DATA = Path(os.environ.get("AIEXPORT_TEST_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))
PARSING = DATA / "json" / "JSONTestSuite" / "test_parsing"
VALUE = Reader(Automaton.build(Grammar(dict(RULES), "value"), max_states=10_000))
OBJECT = Reader(Automaton.build(JSON_OBJECT, max_states=10_000))
# Of the suite's valid texts, what is narrower here: how many digits a fraction has.
LACKED = {"y_number_double_close_to_zero.json"}


def accepts(reader: Reader, data: bytes) -> bool:
    positions = reader.read(reader.beginning, data)
    return bool(positions) and reader.num_bytes_left(positions) == 0


def blank_bounded(data: bytes) -> bytes:
    """As a prefill is read, the blanks after the document left out."""
    return document_prefix(data.rstrip(b" \t\r\n").decode("utf-8", "surrogateescape"))


def test_json_test_suite() -> None:
    if not PARSING.is_dir():
        pytest.skip(f"there is no JSONTestSuite in {PARSING}; set AIEXPORT_TEST_DATA to the folder of the shared data")
    lacked = set()
    for path in sorted(PARSING.iterdir()):
        data = path.read_bytes()
        try:
            accepted = accepts(VALUE, blank_bounded(data))
        except UnicodeEncodeError:  # bytes that are no UTF-8
            accepted = accepts(VALUE, data)
        if accepted:
            assert not path.name.startswith("n_"), path.name
            json.loads(data.decode("utf-8"))
        elif path.name.startswith("y_"):
            lacked.add(path.name)
    assert lacked == LACKED


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), values, max_size=4), st.booleans(), st.sampled_from([None, 0, 1, 2]))
def test_what_dumps_writes_is_in_the_grammar(document: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only, indent=indent)
    assert accepts(OBJECT, text.encode())
    assert accepts(OBJECT, document_prefix(text))
    assert json.loads(document_prefix(text)) == document
    data = text.encode()
    positions = OBJECT.beginning
    for place in range(len(data)):
        positions = OBJECT.read(positions, data[place : place + 1])
        ending = OBJECT.ending(positions)
        assert len(ending) == OBJECT.num_bytes_left(positions)
        assert isinstance(json.loads(data[: place + 1] + ending), dict)
    assert OBJECT.is_over(positions)


def test_blanks_of_a_prefill() -> None:
    for text, read in (
        ('  \n{ \t "a" :\r\n [1,  2', b'{ "a" :\n[1, 2'),
        ('{"a  b\\"  c"  :  "  ', b'{"a  b\\"  c" : "  '),
        ("", b""),
    ):
        assert document_prefix(text) == read
    assert not OBJECT.read(OBJECT.beginning, document_prefix('{"a": 1 2')), "a blank between digits is not lost"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, MAX_CODE_POINT), st.integers(0, MAX_CODE_POINT))
def test_ranges_of_characters_in_utf8(one: int, other: int) -> None:
    low, high = sorted((one, other))
    if low <= 0xDFFF and high >= 0xD800:
        low, high = 0xE000, max(high, 0xE000)
    sequences = list(byte_ranges(low, high))

    def matched(code: int) -> bool:
        data = chr(code).encode()
        return any(
            len(sequence) == len(data) and all(a <= byte <= b for byte, (a, b) in zip(data, sequence, strict=True))
            for sequence in sequences
        )

    for code in {low, high, (low + high) // 2, low - 1, high + 1, 0x7F, 0x80, 0x7FF, 0x800, 0xFFFF, 0x10000}:
        if 0 <= code <= MAX_CODE_POINT and not 0xD800 <= code <= 0xDFFF:
            assert matched(code) is (low <= code <= high)


def reader_of(expression: Expression) -> Reader:
    return Reader(Automaton.build(Grammar({"x": expression}, "x"), max_states=100_000))


@settings(max_examples=150, deadline=None)
@given(st.integers(-3000, 3000), st.integers(-3000, 3000), st.lists(st.integers(-4000, 4000), max_size=20))
def test_integers_within_bounds(one: int, other: int, tried: list[int]) -> None:
    low, high = sorted((one, other))
    expression = numbers.integer(numbers.Bounds(Fraction(low), Fraction(high)))
    assert expression is not None
    reader = reader_of(expression)
    for value in (*tried, low, high, low - 1, high + 1, 0):
        assert accepts(reader, str(value).encode()) is (low <= value <= high)


decimals = st.builds(lambda n, places: Fraction(n, 10**places), st.integers(-5000, 5000), st.integers(0, 3))


@settings(max_examples=150, deadline=None)
@example(Fraction(0), Fraction(1), True, False, [Fraction(1, 100), Fraction(1, 1000)])
@example(Fraction(-1), Fraction(0), False, True, [Fraction(-1, 1000)])
@example(Fraction(5, 2), Fraction(3), True, True, [Fraction(2501, 1000), Fraction(2999, 1000)])
@given(decimals, decimals, st.booleans(), st.booleans(), st.lists(decimals, max_size=20))
def test_numbers_within_bounds(one: Fraction, other: Fraction, low_strict: bool, high_strict: bool, tried: Any) -> None:
    low, high = sorted((one, other))
    bounds = numbers.Bounds(low, high, low_strict, high_strict)
    expression = numbers.number(bounds)
    if expression is None:
        assert low == high or high - low < Fraction(1, 1000)
        return
    reader = reader_of(expression)
    shortest = reader.ending(reader.beginning)
    assert bounds.has(Fraction(shortest.decode()))
    for value in (*tried, low, high):
        whole, tenths = divmod(abs(value), 1)
        digits = f"{int(tenths * 10**6):06}".rstrip("0")
        text = f"{'-' if value < 0 else ''}{whole}{'.' + digits if digits else ''}"
        if accepts(reader, text.encode()):
            assert bounds.has(value)
        else:
            assert not bounds.has(value) or text == "-0"


def test_open_bounds() -> None:
    for bounds, good, bad in (
        (numbers.Bounds(low=Fraction(5)), ["5", "99999", "5.5"], ["4", "4.9", "-5"]),
        (numbers.Bounds(high=Fraction(-2), high_strict=True), ["-3", "-2.5", "-1000"], ["-2", "0", "-1.9"]),
        (numbers.Bounds(low=Fraction(0), low_strict=True), ["0.1", "1"], ["0", "-1", "-0.1"]),
    ):
        expression = numbers.number(bounds)
        assert expression is not None
        reader = reader_of(expression)
        assert [accepts(reader, text.encode()) for text in (*good, *bad)] == [True] * len(good) + [False] * len(bad)
