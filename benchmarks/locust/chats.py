"""One streamed chat, timed as it comes: a plain connection, no parsing beyond what is measured."""

from __future__ import annotations

import base64
import http.client
import json
import random
import struct
import time
import zlib
from dataclasses import dataclass, field

TIMEOUT_S = 120.0
_DELTA = b"event: content_block_delta\n"
_END = b"event: message_delta\n"
_ERROR = b"event: error\n"
_WORDS = (
    *("bear", "river", "house", "small", "garden", "morning", "light", "table", "story", "letter", "window"),
    *("friend", "travel", "music", "water", "stone", "bread", "summer", "winter", "forest", "mountain", "road"),
    *("paper", "colour", "number", "question", "answer", "night", "market", "bridge", "island", "ship"),
)


class ChatFailed(Exception):
    """The chat did not come to its end; a few words why."""


@dataclass(slots=True)
class Chat:
    """Times in seconds of `time.perf_counter`. `gaps`: between two pieces of text."""

    first_token: float = 0.0
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    output_tokens: int = 0


def prompt(num_tokens: int, seed: int) -> str:
    """Words, about as many as tokens, that no earlier prompt began with."""
    draw = random.Random(seed)
    return " ".join(draw.choices(_WORDS, k=num_tokens))


def picture(side: int, seed: int) -> bytes:
    """A PNG of two colours, unlike those of other seeds: a shape's upper left and the ground around it."""
    draw = random.Random(seed)
    ground, shape = (bytes(draw.randrange(256) for _ in range(3)) for _ in range(2))
    edge = draw.randrange(side // 4, side)
    upper, lower = b"\0" + shape * edge + ground * (side - edge), b"\0" + ground * side
    pixels = zlib.compress(upper * edge + lower * (side - edge), 1)
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def with_picture(text: str, data: bytes) -> list[dict[str, object]]:
    """The content of a message that asks about a picture."""
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(data).decode()}
    return [{"type": "image", "source": source}, {"type": "text", "text": text}]


def stream(host: str, key: str, body: dict[str, object]) -> Chat:
    """Sends a streaming request to `host` (http://HOST:PORT) and reads it to its end. Raises `ChatFailed`."""
    secure, _, place = host.rpartition("://")
    kind = http.client.HTTPSConnection if secure == "https" else http.client.HTTPConnection
    connection = kind(place.rstrip("/"), timeout=TIMEOUT_S)
    try:
        headers = {"Content-Type": "application/json", "X-API-Key": key}
        connection.request("POST", "/v2/messages/stream", json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise ChatFailed(f"status {reply.status}: {_message(reply.read())}")
        return _read(reply)
    except (OSError, http.client.HTTPException) as error:
        raise ChatFailed(f"{type(error).__name__}: {error}") from None
    finally:
        connection.close()


def _read(reply: http.client.HTTPResponse) -> Chat:
    chat = Chat()
    last_text = 0.0
    rest = b""
    while piece := reply.read1(1 << 16):
        now = time.perf_counter()
        events, _, rest = (rest + piece).rpartition(b"\n\n")
        if _DELTA in events:
            if last_text:
                chat.gaps.append(now - last_text)
            else:
                chat.first_token = now
            last_text = now
        if _ERROR in events:
            raise ChatFailed(f"error event: {_message(_data(events, _ERROR))}")
        if _END in events:
            chat.output_tokens = json.loads(_data(events, _END))["usage"]["output_tokens"]
            chat.ended = now
    if not chat.ended:
        raise ChatFailed("the stream was cut")
    return chat


def _data(events: bytes, event: bytes) -> bytes:
    """The data line of the first event of that name."""
    return events.partition(event)[2].partition(b"\n\n")[0].removeprefix(b"data: ")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:100].decode("utf-8", "replace")
