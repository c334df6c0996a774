"""A text of a million characters is not looked at one by one for pictures: it would hold up every stream."""

from __future__ import annotations

from collections.abc import Iterator

from aiexport_edge.engine.text.template import Message
from aiexport_edge.shim.api.messages_request import MessagesRequest, Turn


class Unread(str):
    """A text that nobody may walk through."""

    __slots__ = ()

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("read character by character")


def test_a_text_has_no_pictures_whatever_its_length() -> None:
    text = Unread("Tell me a story.")
    request = MessagesRequest(
        model="m",
        turns=(Turn("user", text),),
        system=None,
        max_tokens=None,
        temperature=1.0,
        top_p=None,
        top_k=None,
        stop_sequences=(),
        seed=None,
        stream=False,
    )
    assert request.images == []
    assert Message("user", text).pictures == []
