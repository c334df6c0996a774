"""`GET /v2/models` and `/v2/models/{id}`, also under `/v1`: the models that the caller's plan allows."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from aiexport_edge.shim.api.access import enter
from aiexport_edge.shim.api.paging import limit_of, page, unknown_cursor
from aiexport_edge.shim.errors import InvalidRequest, quoted
from aiexport_edge.shim.services import Services

FAMILIES = ("opus", "sonnet", "haiku", "custom")


class Models:
    """The two endpoints."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def list_models(self, request: Request) -> Response:
        principal = await enter(self._services, request.scope, "messages")
        limit = limit_of(request)
        family = request.query_params.get("family")
        if family is not None and family not in FAMILIES:
            raise InvalidRequest(f"family: must be one of {', '.join(FAMILIES)}, not {quoted(family)}", param="family")
        listed = self._services.catalog.visible(principal)
        after_id = request.query_params.get("after_id")
        if after_id is not None:
            ids = [model.id for model in listed]
            if after_id not in ids:
                raise unknown_cursor(after_id, "model")
            listed = listed[ids.index(after_id) + 1 :]
        rest = [model for model in listed if family in (None, model.spec.family)]
        shown = [self._services.catalog.describe(model) for model in rest[:limit]]
        return _json(page(shown, has_more=len(rest) > limit))

    async def get_model(self, request: Request) -> Response:
        principal = await enter(self._services, request.scope, "messages")
        listed = self._services.catalog.show(request.path_params["model_id"], principal)
        return _json(self._services.catalog.describe(listed))


def _json(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")
