"""A client that costs little: raw sockets and one epoll, nothing parsed that need not be.

It counts events and tokens by counting bytes: every token's text begins with the one blank that it has, and an event
has two besides (after `event:` and `data:`).
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from dataclasses import dataclass
from typing import Any

MODEL = "apex-haiku-4-20250401"
_DELTA = b"content_block_delta\ndata: "
_RECEIVE_BYTES = 1 << 18
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def request(key: str, *, max_tokens: int, pace_us: int = 0, prompt_ms: int = 0, stream: bool = True) -> bytes:
    """A whole HTTP/1.1 request with a short prompt; how fast the core is to be, as `core.py` understands it."""
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": max_tokens,
        "seed": pace_us,
        "top_k": prompt_ms,
        "messages": [{"role": "user", "content": "Tell me a story about three bears."}],
    }
    content = json.dumps(body).encode()
    path = "/v2/messages/stream" if stream else "/v2/messages"
    head = (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"x-api-key: {key}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def connect(address: tuple[str, int]) -> socket.socket:
    connection = socket.create_connection(address, timeout=30)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


@dataclass
class Counts:
    """What has come: pieces as the socket gave them, delta events and tokens."""

    pieces: int = 0
    events: int = 0
    tokens: int = 0
    num_bytes: int = 0

    def add(self, data: bytes) -> None:
        events = data.count(b"\n\n")
        self.pieces += 1
        self.events += events
        self.tokens += data.count(b" ") - 2 * events
        self.num_bytes += len(data)

    def since(self, earlier: Counts) -> Counts:
        return Counts(
            self.pieces - earlier.pieces,
            self.events - earlier.events,
            self.tokens - earlier.tokens,
            self.num_bytes - earlier.num_bytes,
        )

    def copy(self) -> Counts:
        return Counts(self.pieces, self.events, self.tokens, self.num_bytes)


class Streams:
    """Many open streams that are read as they come."""

    def __init__(self, address: tuple[str, int], sent: bytes, num_streams: int) -> None:
        self._poll = select.epoll()
        self._connections = {}
        self.counts = Counts()
        for _ in range(num_streams):
            connection = connect(address)
            connection.sendall(sent)
            connection.setblocking(False)
            self._connections[connection.fileno()] = connection
            self._poll.register(connection, select.EPOLLIN)

    def read_for(self, seconds: float) -> None:
        """Raises `EOFError` where a stream ends: it should have gone on."""
        end = time.monotonic() + seconds
        connections, counts = self._connections, self.counts
        while (left := end - time.monotonic()) > 0:
            for number, _ in self._poll.poll(left):
                data = connections[number].recv(_RECEIVE_BYTES)
                if not data:
                    raise EOFError
                counts.add(data)

    def read_until_all_run(self) -> None:
        """Until each stream has had its first text."""
        waiting = set(self._connections)
        while waiting:
            ready = self._poll.poll(30)
            if not ready:
                raise TimeoutError
            for number, _ in ready:
                data = self._connections[number].recv(_RECEIVE_BYTES)
                if not data.startswith(b"HTTP/1.1 200") and number in waiting and b"HTTP/1.1" in data[:20]:
                    raise SystemExit(f"refused: {data[:500].decode()}")
                if _DELTA in data:
                    waiting.discard(number)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._poll.close()


def first_token_s(connection: socket.socket, sent: bytes) -> float:
    """From the request to its first text on an open connection; reads the reply to its end."""
    started = time.perf_counter()
    connection.sendall(sent)
    received, first = b"", 0.0
    while b"message_stop" not in received or not received.endswith(b"0\r\n\r\n"):
        data = connection.recv(_RECEIVE_BYTES)
        if not data:
            raise EOFError(received.decode())
        received += data
        if not first and _DELTA in received:
            first = time.perf_counter() - started
    return first


def is_whole(reply: bytes) -> bool:
    """Whether a reply with a Content-Length has come to its end."""
    head, separator, body = reply.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return bool(separator) and length is not None and len(body) >= int(length[1])


def unary(address: tuple[str, int], sent: bytes, *, num_connections: int, seconds: float) -> tuple[int, list[float]]:
    """Whole replies on as many connections at once: how many came (one at least), and each one's seconds."""
    poll = select.epoll()
    connections, started = {}, {}
    times: list[float] = []
    for _ in range(num_connections):
        connection = connect(address)
        connections[connection.fileno()] = connection
        poll.register(connection, select.EPOLLIN)
        started[connection.fileno()] = time.perf_counter()
        connection.sendall(sent)
    end = time.monotonic() + seconds
    received = dict.fromkeys(connections, b"")
    while time.monotonic() < end or not times:
        for number, _ in poll.poll(1):
            received[number] += connections[number].recv(_RECEIVE_BYTES)
            if is_whole(received[number]):
                if not received[number].startswith(b"HTTP/1.1 200"):
                    raise SystemExit(f"refused: {received[number][:500].decode()}")
                now = time.perf_counter()
                times.append(now - started[number])
                received[number] = b""
                started[number] = now
                connections[number].sendall(sent)
    for connection in connections.values():
        connection.close()
    poll.close()
    return len(times), times
