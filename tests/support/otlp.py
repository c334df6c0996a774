"""A small OpenTelemetry collector in this process: takes OTLP over gRPC and keeps the spans."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as stubs
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(stubs.TraceServiceServicer):
    """Listens at `endpoint` until `close`. `spans` are in the order of their coming, each with its service's name."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self._changed = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        stubs.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> Any:
        with self._changed:
            for group in request.resource_spans:
                name = next(each.value.string_value for each in group.resource.attributes if each.key == "service.name")
                self.spans += [(name, span) for scope in group.scope_spans for span in scope.spans]
            self._changed.notify_all()
        return service.ExportTraceServiceResponse()

    def wait_for(self, condition: Callable[[list[tuple[str, Span]]], bool], what: str, seconds: float = 30.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.spans), seconds), f"not seen: {what}"

    def close(self) -> None:
        self._server.stop(None).wait()


def attributes(span: Any) -> dict[str, Any]:
    """Of a span or an event, as plain values."""
    found = {}
    for each in span.attributes:
        kind = each.value.WhichOneof("value")
        found[each.key] = getattr(each.value, kind)
    return found
