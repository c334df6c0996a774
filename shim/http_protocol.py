"""uvicorn's HTTP/1.1 protocol with what a server on an open network needs besides: bounds on a request's head, and the
error shape for what is not HTTP at all.
"""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from aiexport_edge.shim.errors import InvalidRequest, error_body
from aiexport_edge.shim.store.keys import new_id

MAX_HEAD_BYTES = 64 << 10
HEAD_S = 30.0  # from a connection's, or a further request's, first byte to the end of its head


class HttpProtocol(HttpToolsProtocol):
    """Closes a connection whose request head is too long, or is not there in time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0  # of a head that has not ended yet
        self._head_timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing() or not self._head_bytes:
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request's head is too long.")
        elif self._head_timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._end_of_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._end_of_head()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._end_of_head()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        request_id = new_id("req_")
        body = error_body(InvalidRequest(msg), request_id)
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nrequest-id: {request_id}\r\nx-request-id: {request_id}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()

    def _end_of_head(self) -> None:
        self._head_bytes = 0
        self._stop_timer()

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.close()
