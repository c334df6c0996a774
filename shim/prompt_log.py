"""What clients send, in the access line: a layer that is there only where the operator has asked for it.

Pictures are left out: a log of prompts is text, and of a picture its size says enough.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aiexport_edge.shim.exchange import exchange_of

MAX_BYTES = 64 << 10
# What base64 looks like in JSON, where `/` may be escaped: what a field "data" or a data URL holds, and any long run.
_PLAIN = rb"[A-Za-z0-9+/=]"
_ESCAPED = rb"(?:\\/|\\[rnt]|\\u00[2-7][0-9A-Fa-f])"
_OPENING = re.compile(rb'"data"\s*:\s*"|;base64,|(?:' + _PLAIN + rb"|" + _ESCAPED + rb"){256}")
_RUN = re.compile(_PLAIN + rb"*+(?:" + _ESCAPED + _PLAIN + rb"*+)*+")
_HELD_BYTES = 256 * 6  # the longest beginning of an opening that may still lack its end


class Redactor:
    """Takes pictures out of a JSON body that comes in pieces. Holds a bounded part of it."""

    def __init__(self) -> None:
        self._text: list[bytes] = []
        self._size = 0  # of the text
        self._pending = b""
        self._skipped: int | None = None  # bytes of a picture so far; None: not in one

    @property
    def full(self) -> bool:
        """Nothing more is kept."""
        return self._size >= MAX_BYTES

    def feed(self, piece: bytes, *, last: bool = False) -> None:
        """The next piece of the body."""
        data = self._pending + piece
        at = 0
        while not self.full:
            if self._skipped is not None:
                run = _RUN.match(data, at)
                assert run is not None
                self._skipped += run.end() - at
                at = run.end()
                if not last and len(data) - at < 6:  # an escape may be cut in two
                    break
                self._keep(b"<%d bytes left out>" % self._skipped)
                self._skipped = None
            found = _OPENING.search(data, at)
            if found is None:
                end = len(data) if last else max(at, len(data) - _HELD_BYTES)
                self._keep(data[at:end])
                at = end
                break
            named = found[0].endswith((b'"', b","))
            end = found.end() if named else found.start()
            self._keep(data[at:end])
            at, self._skipped = end, 0
        self._pending = b"" if self.full else data[at:]

    def text(self) -> str:
        """All of it that is kept."""
        return b"".join(self._text)[:MAX_BYTES].decode("utf-8", "replace")

    def _keep(self, text: bytes) -> None:
        self._text.append(text)
        self._size += len(text)


class PromptLog:
    """Around one endpoint: its request's body, pictures left out and cut at `MAX_BYTES`, as the field `prompt`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        redactor = Redactor()

        async def receive_and_note() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not redactor.full:
                redactor.feed(message.get("body", b""))
            return message

        try:
            await self._app(scope, receive_and_note, send)
        finally:
            redactor.feed(b"", last=True)
            exchange_of(scope).facts["prompt"] = redactor.text()
