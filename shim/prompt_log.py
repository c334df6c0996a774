"""What clients send, in the access line: a layer that is there only where the operator has asked for it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aiexport_edge.shim.exchange import exchange_of

MAX_BYTES = 64 << 10


class PromptLog:
    """Around one endpoint: its request's body, cut at `MAX_BYTES`, as the field `prompt`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[bytes] = []
        size = 0

        async def receive_and_note() -> Message:
            nonlocal size
            message = await receive()
            if size < MAX_BYTES:
                piece = message.get("body", b"")[: MAX_BYTES - size]
                pieces.append(piece)
                size += len(piece)
            return message

        try:
            await self._app(scope, receive_and_note, send)
        finally:
            exchange_of(scope).facts["prompt"] = b"".join(pieces).decode("utf-8", "replace")
