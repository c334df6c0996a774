"""A span for each REST request, and for each try at a request of a batch, which the engine's span goes on from: W3C
Trace Context in, and out in the metadata.

There only where `[telemetry] otlp_endpoint` is set; OpenTelemetry is imported only then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from aiexport_edge.proto.tracing import TRACEPARENT, TRACESTATE, open_tracer_provider
from aiexport_edge.shim.errors import ApiError
from aiexport_edge.shim.exchange import Exchange, exchange_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SERVICE = "aiexport-edge-shim"
_UNTRACED = frozenset({"/healthz", "/readyz"})  # asked every few seconds for ever
_ATTRIBUTES = {
    "workspace": "aiexport.workspace",
    "key": "aiexport.key_id",
    "model": "gen_ai.request.model",
    "input": "gen_ai.usage.input_tokens",
    "cached": "gen_ai.usage.cache_read.input_tokens",
    "output": "gen_ai.usage.output_tokens",
    "first_ms": "aiexport.first_token_ms",
    "outcome": "aiexport.outcome",
    "batch": "aiexport.batch_id",
}

# What a request to an engine carries, so that its span is part of the trace. Empty where nothing is traced.
trace_context: ContextVar[dict[str, str] | None] = ContextVar("trace_context", default=None)


class Tracing:
    """Owns the way to the collector. Raises `TracingError` where it can't be set up."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = open_tracer_provider(endpoint, SERVICE)
        self.tracer = self._provider.get_tracer(SERVICE)
        self.propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Sends what is left; waits for it."""
        self._provider.shutdown()

    def onward(self, span: Span) -> dict[str, str]:
        """What the engine's span goes on from."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self.propagator.inject(carrier, set_span_in_context(span))
        return {name: carrier[name] for name in (TRACEPARENT, TRACESTATE) if name in carrier}


@contextmanager
def batch_request_span(tracing: Tracing | None, request_id: str, facts: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Around one try at a request of a batch; gives what the request carries to the engine. `facts` are what is known
    of it at the end.
    """
    if tracing is None:
        yield {}
        return
    from opentelemetry.trace import StatusCode

    span = tracing.tracer.start_span("batch request", attributes={"aiexport.request_id": request_id})
    try:
        yield tracing.onward(span)
    except Exception:
        span.set_status(StatusCode.ERROR)
        raise
    finally:
        span.set_attributes(_attributes(facts))
        span.end()


class TracingMiddleware:
    """Inside the exchange, around everything else."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _UNTRACED:
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind

        carrier = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        parent = self._tracing.propagator.extract(carrier)
        span = self._tracing.tracer.start_span(scope["method"], parent, SpanKind.SERVER)
        token = trace_context.set(self._tracing.onward(span))
        exchange = exchange_of(scope)
        refusal = 0
        try:
            await self._app(scope, receive, send)
        except ApiError as error:
            refusal = error.status
            raise
        except Exception:
            refusal = 500
            raise
        finally:
            trace_context.reset(token)
            _describe(span, scope, exchange, exchange.status or refusal)
            span.end()


def _describe(span: Span, scope: Scope, exchange: Exchange, status: int) -> None:
    from opentelemetry.trace import StatusCode

    span.update_name(f"{scope['method']} {exchange.route}")
    attributes: dict[str, Any] = {
        "http.request.method": scope["method"],
        "http.route": exchange.route,
        "aiexport.request_id": exchange.request_id,
    }
    if status:
        attributes["http.response.status_code"] = status
    span.set_attributes(attributes | _attributes(exchange.facts))
    if status >= 500 or exchange.facts.get("outcome") == "failed":
        span.set_status(StatusCode.ERROR)


def _attributes(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[fact] for fact, name in _ATTRIBUTES.items() if fact in facts}
