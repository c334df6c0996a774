"""Requests over plain sockets, and when each piece of a streamed reply arrived. Costs the machine as little as it can.

Owns HTTP as far as a client needs it (`httptools` parses). What an event means is the server's (`servers.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
import msgspec

Event = dict[str, Any]


@dataclass(slots=True)
class Reply:
    """One streamed reply: seconds (`time.perf_counter`) of the request and of each event that brought text."""

    started: float
    texts: list[float]
    num_tokens: int

    @property
    def first_s(self) -> float:
        return self.texts[0] - self.started

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.texts, self.texts[1:], strict=False)]


class RequestFailed(RuntimeError):
    """The server did not answer with a stream."""


@dataclass(slots=True)
class _Parser:
    """Callbacks of httptools; body pieces with their time."""

    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    complete: bool = False

    def on_body(self, body: bytes) -> None:
        self.pieces.append((time.perf_counter(), body))

    def on_message_complete(self) -> None:
        self.complete = True


async def stream(
    port: int, path: str, headers: dict[str, str], body: Event, read: Callable[[Event], tuple[str, int | None]]
) -> Reply:
    """POST, and read the events. `read` gives an event's text and, where it says so, the reply's number of tokens."""
    content = msgspec.json.encode(body)
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", "Connection: close", "Accept: text/event-stream"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    parsed = _Parser()
    parser = httptools.HttpResponseParser(parsed)
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        while not parsed.complete:
            data = await reader.read(65536)
            if not data:
                break
            parser.feed_data(data)
    finally:
        writer.close()
    if not parsed.pieces or parser.get_status_code() != 200:
        said = b"".join(piece for _, piece in parsed.pieces)[:300].decode(errors="replace")
        raise RequestFailed(f"status {parser.get_status_code() if parsed.pieces else 'none'}: {said}")
    return _read_events(started, parsed.pieces, read)


def _read_events(
    started: float, pieces: list[tuple[float, bytes]], read: Callable[[Event], tuple[str, int | None]]
) -> Reply:
    texts: list[float] = []
    num_tokens = None
    rest = b""
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:") or line[5:].strip() in (b"", b"[DONE]"):
                continue
            event = msgspec.json.decode(line[5:])
            text, told = read(event)
            if text:
                texts.append(at)
            num_tokens = told if told is not None else num_tokens
    if not texts:
        raise RequestFailed("a reply without text")
    return Reply(started, texts, num_tokens if num_tokens is not None else len(texts))
