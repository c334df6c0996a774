"""How shim and engine send traces: OpenTelemetry's SDK, set up alike in both. Imported heavily only where configured.

Batches of spans go out over OTLP (gRPC) from a thread of their own; a collector that is slow or away loses spans and
holds up nothing. The SDK reads its usual environment too (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, …).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from aiexport_edge.proto.version import product_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

TRACEPARENT = "traceparent"  # W3C Trace Context, in headers and in GenerateRequest.metadata
TRACESTATE = "tracestate"
_PATIENCE_S = 2.0  # with a collector, for a batch of spans; also what the end of a process may wait for it


class TracingError(Exception):
    """Traces are configured and can't be sent: a sentence for the operator."""


def open_tracer_provider(endpoint: str, service: str) -> TracerProvider:
    """Sends the spans of the process to `endpoint`, a URL; `shutdown` it at the end. Raises `TracingError`."""
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise TracingError(
            "[telemetry] otlp_endpoint needs OpenTelemetry's packages, which are not installed; "
            "run in the project's folder: pip install '.[otel]'"
        ) from None
    provider = TracerProvider(
        resource=Resource.create(
            {
                "service.name": service,
                "service.version": product_version(),
                "service.instance.id": f"{os.uname().nodename}-{os.getpid()}",
            }
        )
    )
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=_PATIENCE_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
