"""Any bytes end as a value or as `InvalidRequest`; JSONTestSuite says which."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiexport_edge.shim.errors import InvalidRequest, UnsupportedMediaType
from aiexport_edge.shim.json_body import MAX_DEPTH, MAX_VALUES, parse, require_json

DATA = Path(os.environ.get("AIEXPORT_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SUITE = DATA / "json" / "JSONTestSuite" / "test_parsing"
CASES = sorted(SUITE.glob("*.json")) if SUITE.is_dir() else []


@pytest.mark.skipif(not CASES, reason=f"no JSONTestSuite in {SUITE}; set AIEXPORT_TEST_DATA")
def test_json_test_suite() -> None:
    """y_ is accepted, n_ refused, i_ is either."""
    wrong = []
    for case in CASES:
        try:
            parse(case.read_bytes())
            accepted = True
        except InvalidRequest:
            accepted = False
        if (case.name.startswith("y_") and not accepted) or (case.name.startswith("n_") and accepted):
            wrong.append(case.name)
    assert len(CASES) > 300
    assert wrong == []


@given(st.binary(max_size=200))
def test_any_bytes(body: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        parse(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \n",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b"[1,]",
        b"{'a':1}",
        b"NaN",
        b"-Infinity",
        b"// x\n{}",
        b"[" * 10_000 + b"]" * 10_000,
        b'{"a":' * 100_000,
        '{"a":"\ud800"}'.encode("utf-8", "surrogatepass"),
    ],
)
def test_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(body)


def test_accepted() -> None:
    assert parse(b'{"a":1,"a":2}') == {"a": 2}
    assert parse(b"1.0") == 1.0
    assert parse(b'"\\ud800"') == "\ud800"
    assert parse(b"1" * 5000) == float("inf")
    assert parse(b"-" + b"1" * 5000) == float("-inf")
    assert parse(b"1e999") == float("inf")


def test_depth_is_bounded() -> None:
    """Alike with every version of Python, whose own limits differ."""
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        assert parse(opening * MAX_DEPTH + b"1" + closing * MAX_DEPTH)
        with pytest.raises(InvalidRequest, match="nested"):
            parse(opening * (MAX_DEPTH + 1) + b"1" + closing * (MAX_DEPTH + 1))
    wide = b"[" + b'[{"[[":"{"}],' * 1000 + b"1]"
    assert len(parse(wide)) == 1001  # type: ignore[arg-type]
    assert parse(b'"' + b"[" * 10_000 + b'"') == "[" * 10_000


def test_number_of_values_is_bounded() -> None:
    """A body of millions of tiny values would need hundreds of megabytes; commas in a text are no values."""
    with pytest.raises(InvalidRequest, match="250,000"):
        parse(b"[" + b"{}," * MAX_VALUES + b"{}]")
    with pytest.raises(InvalidRequest, match="250,000"):
        parse(b'{"' + b"a,:" * MAX_VALUES + b'":' + b'["",' + b'"",' * MAX_VALUES)
    assert parse(b"[" + b"1," * (MAX_VALUES - 1) + b"1]") == [1] * MAX_VALUES
    with pytest.raises(InvalidRequest, match="250,000"):
        parse(b'"' + b"," * 2 * MAX_VALUES + b'"' + b'""' * 3 * MAX_VALUES)
    text = "a,\\\\b:[{" * MAX_VALUES
    assert parse(f'{{"text": "{text}"}}'.encode()) == {"text": text.replace("\\\\", "\\")}


@pytest.mark.parametrize(
    "declared", [None, b"", b"application/json", b"Application/JSON; charset=utf-8", b"text/plain"]
)
def test_declared_as_json(declared: bytes | None) -> None:
    require_json(declared, None)
    require_json(declared, b"identity")


@pytest.mark.parametrize(
    "declared", [b"application/xml", b"multipart/form-data; boundary=x", b"text/html", b"image/png"]
)
def test_declared_as_another_document(declared: bytes) -> None:
    with pytest.raises(UnsupportedMediaType):
        require_json(declared, None)


def test_compressed_body() -> None:
    with pytest.raises(UnsupportedMediaType):
        require_json(b"application/json", b"gzip")
