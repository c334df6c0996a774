"""Server-sent events of a message, as bytes. WHATWG HTML section 9.2; the events are Anthropic's Messages stream.

Each event has `event:` and one `data:` line, whose JSON carries the same `type`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from aiexport_edge.shim.errors import ApiError, error_document

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
BLOCK_START = (
    b"event: content_block_start\n"
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
)
BLOCK_STOP = b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
MESSAGE_STOP = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_DELTA = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":%s}}\n\n'
)

_encode = msgspec.json.Encoder().encode


def event(name: str, data: dict[str, Any]) -> bytes:
    """One event; `data` must have `name` as its `type`. JSON holds no line break, so one `data:` line is enough."""
    return b"event: %s\ndata: %s\n\n" % (name.encode(), _encode(data))


def text_delta(text: str) -> bytes:
    return _DELTA % _encode(text)


def message_start(message: dict[str, Any]) -> bytes:
    """`message` is the reply's object with empty content and its input usage."""
    return event("message_start", {"type": "message_start", "message": message})


def message_delta(*, stop_reason: str, stop_sequence: str | None, output_tokens: int) -> bytes:
    return event(
        "message_delta",
        {
            "type": "message_delta",
            "delta": {"stop_reason": stop_reason, "stop_sequence": stop_sequence},
            "usage": {"output_tokens": output_tokens},
        },
    )


def error(error: ApiError, request_id: str) -> bytes:
    return event("error", error_document(error, request_id))
