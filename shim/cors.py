"""Cross-origin calls (WHATWG Fetch, section 3.2): which web pages' scripts may call. Off unless configured."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from aiexport_edge.shim import logs
from aiexport_edge.shim.errors import InvalidRequest, error_body
from aiexport_edge.shim.store.keys import new_id

MAX_AGE_S = 600
METHODS = ("GET", "POST", "DELETE")
LIMITS = [f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]
EXPOSED = ("request-id", "x-request-id", "retry-after", "x-should-retry", "idempotent-replayed", *LIMITS)


class Cors(CORSMiddleware):
    """The outermost layer, so that errors can be read too. Answers a browser's preflights itself."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=METHODS,
            allow_headers=("*",),
            expose_headers=EXPOSED,
            max_age=MAX_AGE_S,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        request_id = new_id("req_")
        if response.status_code != 200:
            refused = InvalidRequest("A script of this page may not make this call; the operator names those that may.")
            headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
            body = error_body(refused, request_id)
            response = Response(body, refused.status, headers=headers, media_type="application/json")
        response.headers["request-id"] = response.headers["x-request-id"] = request_id
        logs.access(f"OPTIONS (preflight) {response.status_code}", {"request_id": request_id})
        return response
