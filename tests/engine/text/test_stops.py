"""Stop sequences: found wherever tokens cut the text, and nothing shown that belongs to one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.engine.text.stops import StopMatcher


def run(stops: list[str], parts: list[str]) -> tuple[str, str | None, int]:
    """The text shown, the sequence found, and how many parts were fed."""
    matcher, shown = StopMatcher(stops), ""
    for count, part in enumerate(parts, start=1):
        text, stop = matcher.feed(part)
        shown += text
        if stop is not None:
            return shown, stop, count
    return shown + matcher.flush(), None, len(parts)


def by_definition(stops: list[str], text: str) -> tuple[str, str | None]:
    """The first character at which the text ends with a stop sequence; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


SHORT = st.text(alphabet="ab\n", min_size=1, max_size=5)


@settings(max_examples=1000, deadline=None)
@given(stops=st.lists(SHORT, max_size=4), parts=st.lists(st.text(alphabet="abc\n", max_size=6), max_size=10))
def test_as_defined_however_the_text_is_cut(stops: list[str], parts: list[str]) -> None:
    shown, stop, _ = run(stops, parts)
    assert (shown, stop) == by_definition(stops, "".join(parts))


@settings(max_examples=500, deadline=None)
@given(
    stops=st.lists(SHORT, min_size=1, max_size=4), parts=st.lists(st.text(alphabet="abc\n", max_size=6), max_size=10)
)
def test_holds_back_exactly_what_may_be_a_beginning(stops: list[str], parts: list[str]) -> None:
    matcher, shown, text = StopMatcher(stops), "", ""
    for part in parts:
        text += part
        certain, stop = matcher.feed(part)
        shown += certain
        if stop is not None:
            return
        held = text[len(shown) :]
        longest = max(
            (length for stop_ in stops for length in range(len(stop_)) if text.endswith(stop_[:length])), default=0
        )
        assert held == text[len(text) - longest :]


@pytest.mark.parametrize(
    ("stops", "parts", "expected"),
    [
        (["END"], ["The E", "N", "D of it"], ("The ", "END", 3)),
        (["END"], ["The E", "N", "C"], ("The ENC", None, 3)),
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", "\n\n", 3)),
        (["abcd", "bc"], ["xabcd"], ("xa", "bc", 1)),  # complete first
        (["bc", "abc"], ["xab", "c"], ("x", "abc", 2)),  # complete together: the longer
        (["é!"], ["caf", "é", "!"], ("caf", "é!", 3)),
        (["aab"], ["a", "a", "a", "b"], ("a", "aab", 4)),
        ([""], ["abc"], ("abc", None, 1)),
    ],
)
def test_examples(stops: list[str], parts: list[str], expected: tuple[str, str | None, int]) -> None:
    assert run(stops, parts) == expected


def test_no_more_is_held_after_a_flush() -> None:
    matcher = StopMatcher(["abc"])
    assert matcher.feed("xab") == ("x", None)
    assert matcher.flush() == "ab"
    assert matcher.flush() == ""
