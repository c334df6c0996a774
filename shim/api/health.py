"""`GET /healthz` (the process is up), `/readyz` (some tier can serve) and, on the admin listener, `/metrics`."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from aiexport_edge.shim import metrics
from aiexport_edge.shim.engines.engines import ModelState
from aiexport_edge.shim.services import Services


class Health:
    """The endpoints; none of them needs a key."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def healthz(self, _request: Request) -> Response:
        return Response(b'{"status":"ok"}', media_type="application/json")

    async def readyz(self, _request: Request) -> Response:
        """200 when at least one tier can serve, else 503; each is listed."""
        tiers = [
            {"id": spec.id, "family": spec.family, "state": self._services.engines.state(spec.weights).value}
            for spec in self._services.config.models
        ]
        ready = any(tier["state"] == ModelState.READY for tier in tiers)
        body = msgspec.json.encode({"status": "ready" if ready else "unavailable", "tiers": tiers})
        return Response(body, 200 if ready else 503, media_type="application/json")

    def metrics(self, _request: Request) -> Response:
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE.decode())
