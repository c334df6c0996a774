"""The log of prompts: text as it was sent, and nothing of a picture."""

from __future__ import annotations

import base64
import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.shim.prompt_log import MAX_BYTES, Redactor

PICTURE = base64.b64encode(random.Random(1).randbytes(5000)).decode()
TINY = base64.b64encode(b"GIF89a\1\0\1\0\0\0\0;").decode()


def logged(body: bytes, cuts: list[int]) -> str:
    redactor = Redactor()
    places = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    for start, end in itertools.pairwise(places):
        redactor.feed(body[start:end])
    redactor.feed(b"", last=True)
    return redactor.text()


def body(*sources: Any, text: str = "What is this?") -> dict[str, Any]:
    blocks = [{"type": "image", "source": source} for source in sources]
    return {"messages": [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]}


SOURCES: list[dict[str, str]] = [
    {"type": "base64", "media_type": "image/png", "data": PICTURE},
    {"type": "base64", "media_type": "image/gif", "data": TINY},
    {"type": "url", "url": f"data:image/gif;base64,{TINY}"},
    {"type": "url", "url": f"data:image/png;base64,{PICTURE}"},
]


@pytest.mark.parametrize("escaped", [False, True])
@given(cuts=st.lists(st.integers(0, 22_000), max_size=12))
@settings(max_examples=40, deadline=None)
def test_pictures_are_left_out_and_text_is_not(escaped: bool, cuts: list[int]) -> None:
    raw = json.dumps(body(*SOURCES, text="Größe <b> & 漢字"), ensure_ascii=False)
    if escaped:
        raw = raw.replace("/", "\\/")
    said = logged(raw.encode(), cuts)
    assert "Größe <b> & 漢字" in said
    assert "bytes left out" in said
    assert TINY not in said
    assert PICTURE[100:140] not in said
    shown = said.replace("\\/", "/")
    for start in range(0, len(PICTURE) - 40, 40):
        assert PICTURE[start : start + 40] not in shown
    if not escaped:
        left = json.loads(said)
        assert left["messages"][0]["content"][0]["source"]["media_type"] == "image/png"
        assert left["messages"][0]["content"][-1]["text"] == "Größe <b> & 漢字"


def test_what_has_no_pictures_is_as_it_was_sent() -> None:
    raw = json.dumps(body(text="a" * 200 + " " + "word " * 100)).encode()
    assert logged(raw, [7, 100, 333]) == raw.decode()
    assert logged(b"", []) == ""
    assert logged(b"\xff", []) == "\ufffd"


def test_the_text_after_a_large_picture_is_kept_and_the_rest_is_cut() -> None:
    large = {"type": "base64", "media_type": "image/png", "data": "QUJD" * 200_000}
    said = logged(json.dumps(body(large, text="the end")).encode(), list(range(0, 900_000, 16_000)))
    assert "the end" in said
    assert len(said) < 400
    assert len(logged(b"x " * MAX_BYTES, list(range(0, 2 * MAX_BYTES, 5000)))) == MAX_BYTES
