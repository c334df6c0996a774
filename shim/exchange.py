"""One HTTP request and its reply: the request id, the last resort for errors, the access line, the counts.

Plain ASGI, the outermost layer. Endpoints find their `Exchange` in the scope and write into it what they learn.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aiexport_edge.shim import logs, metrics
from aiexport_edge.shim.body import ClientDisconnected
from aiexport_edge.shim.engines.generation import ClientGone
from aiexport_edge.shim.errors import (
    ApiError,
    MethodNotAllowed,
    NotFound,
    error_body,
    internal_error,
    store_unavailable,
)
from aiexport_edge.shim.limits.limits import Ticket
from aiexport_edge.shim.store import Principal
from aiexport_edge.shim.store.errors import is_unavailable, remedy
from aiexport_edge.shim.store.keys import new_id

CLIENT_CLOSED = 499  # in the log alone: the client left before there was a status
_MAX_PATH_CHARS = 200
_UNCOUNTED = frozenset({429, 503})  # statuses that cost nothing of the workspace's requests a minute
_PROBES = frozenset({"/healthz", "/readyz"})  # asked every few seconds for ever

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Exchange:
    """What is known of a request so far."""

    request_id: str = field(default_factory=lambda: new_id("req_"))
    started: float = field(default_factory=time.monotonic)
    route: str = "other"  # the path's pattern; never the path itself, which a client chooses
    status: int = 0
    principal: Principal | None = None  # once the door has let the caller in
    ticket: Ticket | None = None  # against the limits of its workspace, where it has any
    origin_id: str | None = None  # of an Idempotency-Key: marks what is done for good, so that it is not done again
    facts: dict[str, Any] = field(default_factory=dict)  # for the access line: workspace, model, tokens, …

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def exchange_of(scope: Scope) -> Exchange:
    exchange: Exchange = scope["aiexport.exchange"]
    return exchange


def error_response(error: ApiError, request_id: str) -> tuple[Message, Message]:
    """The ASGI messages of an error reply."""
    body = error_body(error, request_id)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *error.headers,
    ]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after))).encode()))
    return (
        {"type": "http.response.start", "status": error.status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


async def on_http_exception(request: Request, raised: Exception) -> Response:
    """The router's own 404 and 405, in the error shape."""
    assert isinstance(raised, HTTPException)
    error: ApiError = NotFound("There is nothing at this path.")
    headers = raised.headers
    if raised.status_code == 405:
        error = MethodNotAllowed(f"This path does not answer to {request.method}.")
        headers = {"allow": ", ".join(_methods(request))}  # the router knows those of its first match alone
    body = error_body(error, exchange_of(request.scope).request_id)
    return Response(body, error.status, headers=headers, media_type="application/json")


def _methods(request: Request) -> list[str]:
    """What the request's path does answer to."""
    path = request.scope["path"]
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    return sorted({method for route in routes for method in route.methods or ()})


class ExchangeMiddleware:
    """Gives each request its `Exchange` and answers for whatever the layers below raise."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope["aiexport.exchange"] = Exchange()
        request_id = exchange.request_id.encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                headers = [*message["headers"], (b"request-id", request_id), (b"x-request-id", request_id)]
                if exchange.ticket is not None:
                    if exchange.status in _UNCOUNTED:
                        await exchange.ticket.give_back()
                    headers += exchange.ticket.headers()
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except (ClientDisconnected, ClientGone) as gone:
            exchange.facts["client"] = str(gone) or "left"
        except ApiError as error:
            await self._refuse(exchange, error, send_with_id)
        except SQLAlchemyError as error:
            if not is_unavailable(error):
                log.exception("%s failed", exchange.request_id)
                await self._refuse(exchange, internal_error(), send_with_id)
            else:
                log.error("%s could not be served: %s", exchange.request_id, remedy(error))
                await self._refuse(exchange, store_unavailable(), send_with_id)
        except Exception:
            log.exception("%s failed", exchange.request_id)
            await self._refuse(exchange, internal_error(), send_with_id)
        finally:
            self._account(exchange, scope)

    async def _refuse(self, exchange: Exchange, error: ApiError, send: Send) -> None:
        """Sends the error where no reply has begun; else the server closes the connection, which is all that's left."""
        if exchange.status:
            return
        for message in error_response(error, exchange.request_id):
            await send(message)

    def _account(self, exchange: Exchange, scope: Scope) -> None:
        seconds = exchange.seconds
        status = exchange.status or CLIENT_CLOSED
        method = scope["method"] if exchange.route != "other" else "any"
        metrics.REQUESTS.labels(exchange.route, method, str(status)).inc()
        metrics.REQUEST_SECONDS.labels(exchange.route).observe(seconds)
        path = scope.get("raw_path", b"").decode("ascii", "replace")[:_MAX_PATH_CHARS]
        logs.access(
            f"{scope['method']} {path} {status}",
            {"request_id": exchange.request_id, "ms": round(seconds * 1000, 1), **exchange.facts},
            level=logging.DEBUG if exchange.route in _PROBES else logging.INFO,
        )
