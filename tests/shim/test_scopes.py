"""Which scope each route needs, over every route there is: a new one without a line here fails."""

from __future__ import annotations

from uuid import uuid4

import httpx
import pytest
from starlette.routing import Route
from support.shim_server import ShimServer

from aiexport_edge.shim.app import create_app
from aiexport_edge.shim.store.keys import SCOPES

OPEN = {"/healthz", "/readyz", "/status", "/openapi.json", "/docs", "/v2/oauth/token"}
NEEDS = {
    "/v1/messages": "messages",
    "/v1/models": "messages",
    "/v1/models/{model_id}": "messages",
    "/v2/messages": "messages",
    "/v2/messages/stream": "messages",
    "/v2/models": "messages",
    "/v2/models/{model_id}": "messages",
    "/v2/batch": "batch",
    "/v2/batch/{batch_id}": "batch",
    "/v2/batch/{batch_id}/results": "batch",
    "/v2/batch/{batch_id}/cancel": "batch",
    "/v2/usage": "usage",
    "/v2/keys": "keys",
    "/v2/keys/{key_id}": "keys",
    "/v2/keys/{key_id}/rotate": "keys",
}


def routes(shim: ShimServer) -> list[tuple[str, str]]:
    """Method and path of everything that the application answers to."""
    found = [route for route in create_app(shim.services).routes if isinstance(route, Route)]
    return sorted({(method, route.path) for route in found for method in (route.methods or set()) - {"HEAD"}})


def ask(client: httpx.Client, method: str, path: str, headers: dict[str, str]) -> int:
    return client.request(method, path.replace("{", "").replace("}", ""), headers=headers).status_code


def test_every_route_is_known(shim: ShimServer) -> None:
    assert {path for _, path in routes(shim)} == OPEN | NEEDS.keys()


def test_without_credentials(shim: ShimServer) -> None:
    with httpx.Client(base_url=shim.base_url, timeout=60) as client:
        for method, path in routes(shim):
            if path in NEEDS:
                assert ask(client, method, path, {}) == 401, (method, path)
                assert ask(client, method, path, {"X-API-Key": "axp_live_" + "x" * 43}) == 401, (method, path)


@pytest.mark.parametrize("left_out", SCOPES)
def test_the_scope_of_each_route(shim: ShimServer, left_out: str) -> None:
    """A key with all other scopes gets a 403 exactly where this one is needed."""
    name = "w" + uuid4().hex[:12]
    shim.store.create_workspace(name, "enterprise")
    key = shim.store.create_key(name, scopes=[scope for scope in SCOPES if scope != left_out]).key
    with shim.client(key) as client:
        refused = {path for method, path in routes(shim) if path in NEEDS and ask(client, method, path, {}) == 403}
    assert refused == {path for path, needed in NEEDS.items() if needed == left_out}
