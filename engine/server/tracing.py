"""A span for each traced request in the engine, with its life as events: accepted, scheduled, each step's tokens.

Which requests are traced their clients say, by W3C Trace Context in the request's metadata. There only where
`[telemetry] otlp_endpoint` is set; OpenTelemetry is imported only then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.tracing import TRACEPARENT, TRACESTATE, open_tracer_provider

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SERVICE = "aiexport-edge-engine"
MAX_STEP_EVENTS = 100  # of a long reply the first; all of them are in the span's numbers


class RequestTracer:
    """Owns the way to the collector. Raises `TracingError` where it can't be set up."""

    def __init__(self, endpoint: str) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = open_tracer_provider(endpoint, SERVICE)
        self._tracer = self._provider.get_tracer(SERVICE)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, request: pb.GenerateRequest) -> RequestTrace | None:
        """The request's span; None where its client does not trace it."""
        if TRACEPARENT not in request.metadata:
            return None
        from opentelemetry.trace import SpanKind

        carrier = {name: request.metadata[name] for name in (TRACEPARENT, TRACESTATE) if name in request.metadata}
        span = self._tracer.start_span("generate", self._propagator.extract(carrier), SpanKind.SERVER)
        if not span.is_recording():
            return None
        attributes = {"aiexport.request_id": request.request_id, "gen_ai.request.model": request.model}
        span.set_attributes({**attributes, "aiexport.attempt": request.resume.attempt})
        return RequestTrace(span)

    def close(self) -> None:
        """Sends what is left; waits for it."""
        self._provider.shutdown()


class RequestTrace:
    """One request's span. A step is timed from the one before, as its tokens arrive here."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._steps = 0
        self._last = 0.0
        self._longest = self._total = 0.0

    def accepted(self, prompt_tokens: int, max_tokens: int) -> None:
        self._span.add_event("accepted", {"prompt_tokens": prompt_tokens, "max_tokens": max_tokens})

    def started(self, cached_tokens: int) -> None:
        self._last = time.monotonic()
        self._span.add_event("scheduled", {"cached_tokens": cached_tokens})

    def step(self, num_tokens: int) -> None:
        """One engine step has brought tokens of this request."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        if self._steps:  # the first one's is the prompt's time
            self._total += took
            self._longest = max(self._longest, took)
        if self._steps < MAX_STEP_EVENTS:
            self._span.add_event("step", {"index": self._steps, "tokens": num_tokens, "ms": round(took * 1000, 3)})
        self._steps += 1

    def end(self, outcome: str, *, cached_tokens: int, output_tokens: int) -> None:
        from opentelemetry.trace import StatusCode

        self._span.set_attributes(
            {
                "aiexport.outcome": outcome,
                "aiexport.steps": self._steps,
                "gen_ai.usage.cache_read.input_tokens": cached_tokens,
                "gen_ai.usage.output_tokens": output_tokens,
            }
        )
        if self._steps > 1:
            mean = self._total / (self._steps - 1)
            self._span.set_attribute("aiexport.step_ms.mean", round(mean * 1000, 3))
            self._span.set_attribute("aiexport.step_ms.max", round(self._longest * 1000, 3))
        if outcome == "failed" or outcome.startswith("ERROR_"):
            self._span.set_status(StatusCode.ERROR, outcome)
        self._span.end()
