"""Cutting a batch's body up as it arrives: the same as reading it whole, however it is cut into pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.shim import json_body
from aiexport_edge.shim.batches import split
from aiexport_edge.shim.batches.split import Element, Member, Requests, Splitter
from aiexport_edge.shim.errors import ApiError, InvalidRequest, RequestTooLarge, error_body

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(['"', "\\", '\\"', "[{", "}]", "\u2028", "\\\\"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)
SPACE = st.sampled_from(["", " ", "\n\t", "\r\n  "])


def pieces(body: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(body), *(cut % (len(body) + 1) for cut in cuts)})
    return [body[start:end] for start, end in itertools.pairwise(edges)]


def read(body: bytes, cuts: list[int], *, max_value_bytes: int = 1 << 20) -> tuple[list[Any] | None, dict[str, Any]]:
    """The elements of `requests` (None where it is no array or not there) and the other members."""
    splitter = Splitter(max_value_bytes=max_value_bytes)
    elements: list[Any] | None = None
    members: dict[str, Any] = {}
    for piece in [*pieces(body, cuts), None]:
        for part in splitter.end() if piece is None else splitter.feed(piece):
            match part:
                case Requests():
                    elements = []
                    members.pop("requests", None)
                case Element(raw):
                    assert elements is not None
                    elements.append(json_body.parse(raw))
                case Member(name, raw):
                    members[name] = json_body.parse(raw)
                    if name == "requests":
                        elements = None
    return elements, members


@settings(max_examples=120, deadline=None)
@given(JSON, st.lists(JSON, max_size=6), st.lists(st.integers(0, 10_000), max_size=12), st.data())
def test_the_parts_are_those_of_the_whole(extra: Any, elements: list[Any], cuts: list[int], data: Any) -> None:
    ascii_only = data.draw(st.booleans())
    document = {"webhook_url": extra, "requests": elements, "x": [extra], "requests ": 1}
    gap = data.draw(SPACE)
    text = json.dumps(document, ensure_ascii=ascii_only, indent=data.draw(st.sampled_from([None, 1])))
    found, members = read((gap + text + gap).encode(), cuts)
    assert found == elements
    assert members == {name: value for name, value in document.items() if name != "requests"}


@settings(max_examples=120, deadline=None)
@given(
    st.binary(max_size=80) | st.text('{}[]",:\\ 1tnrequests', max_size=80).map(str.encode), st.lists(st.integers(0, 99))
)
def test_any_bytes_are_read_or_refused_alike(body: bytes, cuts: list[int]) -> None:
    """Whatever `json_body.parse` refuses is refused here, and what is read is the same; cuts change nothing."""

    def outcome(cuts: list[int]) -> Any:
        try:
            return read(body, cuts)
        except ApiError as error:
            return error.message

    assert outcome(cuts) == outcome([])
    try:
        whole: Any = json_body.parse(body)
    except InvalidRequest:
        assert isinstance(outcome([]), str)
        return
    if isinstance(whole, dict):
        elements = whole.get("requests") if isinstance(whole.get("requests"), list) else None
        assert outcome([]) == (elements, {k: v for k, v in whole.items() if k != "requests" or elements is None})
    else:
        assert isinstance(outcome([]), str)


def test_a_later_array_of_the_same_name_counts() -> None:
    assert read(b'{"requests":[1,2],"a":0,"\\u0072equests":[3]}', []) == ([3], {"a": 0})
    assert read(b'{"requests":[1],"requests":null}', []) == (None, {"requests": None})
    assert read(b'{"requests":5,"requests":[6]}', []) == ([6], {})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[]", "must be a JSON object"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"requests":[1', "ends too early"),
        (b'{"requests":[1 2]}', "comma"),
        (b'{"requests":[1,]}', "a value is missing"),
        (b'{"requests":[,1]}', "a value is missing"),
        (b'{"a":1,}', "must begin with"),
        (b'{"a" 1}', "colon"),
        (b"{} {}", "after its end"),
        (b'{"requests":[NaN]}', "NaN"),
        (b'{"requests":[[}]}', "Expecting"),
        (b'{"requests":[{"a":1]]}', "Expecting"),
    ],
)
def test_what_is_no_json_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read(body, [])
    assert said in refused.value.message


def test_a_large_element_is_looked_at_once_and_held_alone() -> None:
    splitter = Splitter(max_value_bytes=4 << 20)
    element = b'{"content":"' + b'\\"x' * 700_000 + b'"}'
    body = b'{"requests":[' + b",".join([element] * 3) + b"]}"
    found, most = 0, 0
    for start in range(0, len(body), 1000):
        for part in splitter.feed(body[start : start + 1000]):
            found += isinstance(part, Element)
        most = max(most, splitter.held_bytes)
    list(splitter.end())
    assert found == 3
    assert most < len(element) + 2000


@pytest.mark.parametrize("element", [b'"' + b"x" * 2000 + b'"', b"1" * 2000, b'{"a":' + b"[" * 2000])
def test_an_element_over_the_limit_is_refused_before_its_end(element: bytes) -> None:
    with pytest.raises(RequestTooLarge) as refused:
        read(b'{"requests":[0,' + element, [], max_value_bytes=1000)
    assert refused.value.param == "requests.1"


def test_a_field_over_the_limit_is_named_as_far_as_it_can_be() -> None:
    """A lone surrogate in its name made an error that could not be sent."""
    with pytest.raises(RequestTooLarge) as refused:
        read(b'{"\\ud800x":"' + b"x" * 2000, [], max_value_bytes=1000)
    assert refused.value.param == "\ufffdx"
    error_body(refused.value, "req_1")


def test_a_hostile_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "MAX_PIECES", 1000)
    with pytest.raises(InvalidRequest, match="more than 1,000 JSON"):
        read(b'{"requests":[' + b'"",' * 1001 + b"0]}", [])
