"""The two ASGI applications of a shim process as lists of routes: the REST one, and the operator's.

What shows more than one workspace is on the operator's alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from aiexport_edge.shim.api.batch import Batches, BatchResults, CreateBatch
from aiexport_edge.shim.api.console import Console
from aiexport_edge.shim.api.docs import Docs
from aiexport_edge.shim.api.health import Health
from aiexport_edge.shim.api.keys import Keys
from aiexport_edge.shim.api.messages import PING_S, Messages
from aiexport_edge.shim.api.models import Models
from aiexport_edge.shim.api.oauth import OAuth
from aiexport_edge.shim.api.status import Status
from aiexport_edge.shim.api.usage import Usage
from aiexport_edge.shim.auth.operator import OperatorGate
from aiexport_edge.shim.cors import Cors
from aiexport_edge.shim.exchange import ExchangeMiddleware, exchange_of, on_http_exception
from aiexport_edge.shim.idempotency import Idempotent
from aiexport_edge.shim.prompt_log import PromptLog
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store.operator_rows import OperatorLogin
from aiexport_edge.shim.telemetry import TracingMiddleware


class _Route(Route):
    """Tells the exchange which route it is, for the counts."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange_of(scope).route = self.path
        await super().handle(scope, receive, send)


def create_app(services: Services, *, ping_s: float = PING_S) -> Starlette:
    """The REST application; its lifespan is that of the services."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with services.running():
            yield

    models, keys, health, batches = Models(services), Keys(services), Health(services), Batches(services)
    create_batch: ASGIApp = Idempotent(CreateBatch(services), services.idempotency)
    docs = Docs()
    messages: ASGIApp = Idempotent(Messages(services, ping_s=ping_s), services.idempotency)
    streaming: ASGIApp = Idempotent(Messages(services, always_stream=True, ping_s=ping_s), services.idempotency)
    if services.config.telemetry.log_prompts:
        messages, streaming = PromptLog(messages), PromptLog(streaming)
    middleware = [Middleware(ExchangeMiddleware)]
    if services.tracing is not None:
        middleware.append(Middleware(TracingMiddleware, services.tracing))
    if services.config.shim.cors_origins:
        middleware.insert(0, Middleware(Cors, services.config.shim.cors_origins))
    app = Starlette(
        routes=[
            _Route("/v2/messages", messages, methods=["POST"]),
            _Route("/v2/messages/stream", streaming, methods=["POST"]),
            _Route("/v2/models", models.list_models),
            _Route("/v2/models/{model_id}", models.get_model),
            _Route("/v2/keys", keys.list_keys),
            _Route("/v2/keys", keys.create, methods=["POST"]),
            _Route("/v2/keys/{key_id}/rotate", keys.rotate, methods=["POST"]),
            _Route("/v2/keys/{key_id}", keys.delete, methods=["DELETE"]),
            _Route("/v2/batch", create_batch, methods=["POST"]),
            _Route("/v2/batch", batches.list_batches),
            _Route("/v2/batch/{batch_id}", batches.get_batch),
            _Route("/v2/batch/{batch_id}/results", BatchResults(services), methods=["GET", "HEAD"]),
            _Route("/v2/batch/{batch_id}/cancel", batches.cancel_batch, methods=["DELETE"]),
            _Route("/v2/oauth/token", OAuth(services).token, methods=["POST"]),
            _Route("/v2/usage", Usage(services).get_usage),
            _Route("/v1/messages", messages, methods=["POST"]),
            _Route("/v1/models", models.list_models),
            _Route("/v1/models/{model_id}", models.get_model),
            _Route("/healthz", health.healthz),
            _Route("/readyz", health.readyz),
            _Route("/status", Status(services).status),
            _Route("/openapi.json", docs.openapi),
            _Route("/docs", docs.page),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: on_http_exception},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def create_admin_app(services: Services, *, public: bool = False) -> Starlette:
    """The operator's application, behind the operator's login. `public`: other machines can reach its listener."""
    health, console = Health(services), Console(services)
    gate = Middleware(OperatorGate, OperatorLogin(services.store.database), services.threads, public=public)
    app = Starlette(
        routes=[
            _Route("/metrics", health.metrics),
            _Route("/console", console.index),
            _Route("/console/{name}", console.workspace),
            _Route("/healthz", health.healthz),
            _Route("/readyz", health.readyz),
        ],
        middleware=[Middleware(ExchangeMiddleware), gate],
        exception_handlers={HTTPException: on_http_exception},
    )
    app.router.redirect_slashes = False
    return app
