"""uvicorn's HTTP/1.1 protocol with what a server on an open network needs besides: bounds on a request's head, on the
number of connections and on what a client that does not read can hold, and the error shape for what is not HTTP at all.

Also what old and new clients need of it: replies without chunks for HTTP/1.0, and bodies beside an offer to upgrade.
"""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, ASGISendEvent, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from aiexport_edge.shim import logs
from aiexport_edge.shim.errors import ApiError, HeadTooLarge, InvalidRequest, Overloaded, error_body
from aiexport_edge.shim.response_stream import EXTENSION, ConnectionStream, PlainStream, TurnWriter
from aiexport_edge.shim.store.keys import new_id

MAX_HEAD_BYTES = 64 << 10
HEAD_S = 30.0  # from a connection's, or a further request's, first byte to the end of its head
MAX_PIPELINED = 32  # requests that wait for an earlier one's reply; what else has arrived is read and held, too
REST_S = 120.0  # for the rest of a body whose reply is out: a client may look for that only when it has sent all
STALL_S = 120.0  # a client that has not made room for more bytes for so long is given up
MAX_CONNECTIONS = 4096


class HttpProtocol(HttpToolsProtocol):
    """Closes a connection whose request head is too long, or is not there in time, and one that takes no bytes.

    Past `max_connections` each further one is told so; past twice as many it is closed at once.
    """

    max_connections = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0  # of a head that has not ended yet
        self._head_timer: TimerHandle | None = None
        self._stall_timer: TimerHandle | None = None
        self._one_too_many = False
        self._upgrade_offered = False  # by the head that has just been read
        self._reading_copy = False  # of a head that has been read already
        self._is_deaf = False  # what comes now is for nobody: the connection ends with the replies under way
        self._replying: RequestResponseCycle | None = None  # `cycle` is the last that has arrived
        self._stream: ConnectionStream | None = None  # of that reply
        self._turn = TurnWriter.of(self.loop)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is None:
            # What is written goes out at once, not at the end of the event loop's turn; a client that leaves anything
            # to be kept here has enough.
            transport.set_write_buffer_limits(high=0)
        self._start_timer()
        if len(self.connections) > self.max_connections:
            self._one_too_many = True
            if len(self.connections) > 2 * self.max_connections:
                transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_stall_timer()
        if self._replying is not None and not self._replying.response_complete:
            self._replying.disconnected = True
            self._replying.message_event.set()
        super().connection_lost(exc)
        if self._stream is not None:
            self._stream.lost()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._is_deaf:
            return
        if self._one_too_many:
            self._refuse(Overloaded("This server has as many connections as it may have.", retry_after=1.0))
            return
        self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        if self.transport.is_closing() or not self._head_bytes:
            return
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_head_too_large())
        elif self._head_timer is None:
            self._start_timer()

    # ------------------------------------------------------------------------------------------ what the parser finds

    def _parse(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._decline_upgrade()
            except httptools.HttpParserError:
                if len(self.url) >= MAX_HEAD_BYTES:  # it takes none of that length
                    self._refuse(_head_too_large())
                else:
                    self.send_400_response("Invalid HTTP request received.")
                return

    def _decline_upgrade(self) -> None:
        """Goes on behind a head that offers another protocol, as Java's and curl's clients offer HTTP/2 by themselves.

        The parser ends the message with such a head and drops its body. A new one is told of the body alone.
        """
        framing = [header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]
        head = b"".join(b"%b: %b\r\n" % header for header in framing)
        self.parser = httptools.HttpRequestParser(self)
        self._upgrade_offered, self._reading_copy = False, True
        self.parser.feed_data(b"POST / HTTP/1.1\r\n" + head + b"\r\n")  # ends the message where it has no body
        self._reading_copy = False

    def on_message_begin(self) -> None:
        if not self._reading_copy:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._reading_copy:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._reading_copy:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._end_of_head()
        if self._reading_copy:
            return
        self._upgrade_offered = self.parser.should_upgrade()
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            raise InvalidRequest("Too many requests were sent before their replies.")  # ends the parser's work, too

    def on_body(self, body: bytes) -> None:
        if not self.cycle.response_complete:
            self._end_of_head()
            super().on_body(body)
            return
        self._head_bytes = 0  # what nobody reads any more may come for a while, however slowly
        if self._head_timer is None:
            self._start_timer(REST_S)

    def on_message_complete(self) -> None:
        self._end_of_head()
        if not self._upgrade_offered:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._replying = cycle
        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(cycle, app)
            self._stream = PlainStream(cycle, self._turn)
        else:
            self._stream = ConnectionStream(cycle, self._turn)
        extensions: dict[Any, Any] = {EXTENSION: self._stream}
        cycle.scope["extensions"] = extensions
        super()._start_asgi_task(cycle, app)

    # ------------------------------------------------------------------------------------------ what takes no bytes

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stream is not None:
            self._stream.set_full(True)
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_stall_timer()
        super().resume_writing()
        if self._stream is not None:
            self._stream.set_full(False)

    def timeout_keep_alive_handler(self) -> None:
        """Closing waits until all is written, for ever where nobody reads."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    # ------------------------------------------------------------------------------------------ heads

    def _refuse(self, error: ApiError) -> None:
        """An error reply where no application has been asked, and the end of the connection.

        In the middle of another reply there is no place for it. What is wrong behind whole requests takes nothing from
        their replies: a body that is longer than it says has been cut where it says, and is told what is wrong with it.
        """
        replying = self._replying
        if replying is not None and not replying.response_complete:
            if not self.cycle.more_body:
                self._is_deaf, self.cycle.keep_alive = True, False
                self._end_of_head()
                return
            if replying is not self.cycle or replying.response_started:
                self.transport.close()
                return
            replying.disconnected = True  # it is the body that is wrong: the application need not wait for its rest
            replying.message_event.set()
        request_id = new_id("req_")
        body = error_body(error, request_id)
        retry = "" if error.retry_after is None else f"retry-after: {error.retry_after:.0f}\r\n"
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nrequest-id: {request_id}\r\nx-request-id: {request_id}\r\n{retry}"
            "connection: close\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
        logs.access(f"- - {error.status}", {"request_id": request_id, "refused": error.message})

    def _end_of_head(self) -> None:
        self._head_bytes = 0
        self._stop_timer()

    def _start_timer(self, seconds: float | None = None) -> None:
        self._head_timer = self.loop.call_later(HEAD_S if seconds is None else seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        self.transport.close()


def _head_too_large() -> HeadTooLarge:
    return HeadTooLarge(f"The request's URL and headers are larger than {MAX_HEAD_BYTES:,} bytes.")


def _without_chunks(cycle: RequestResponseCycle, app: ASGI3Application) -> ASGI3Application:
    """`app` for a client of HTTP/1.0, which knows no chunks: a body of unknown length ends with the connection."""

    async def wrapped(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        length_is_known = True

        async def send_plain(message: ASGISendEvent) -> None:
            nonlocal length_is_known
            if message["type"] == "http.response.start":
                length_is_known = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
                if not length_is_known:
                    cycle.chunked_encoding = False
            elif message["type"] == "http.response.body" and not length_is_known:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return wrapped
