"""Traces of the shim, as a collector gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.otlp import Collector, attributes
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer

from aiexport_edge.engine.server.tracing import MAX_STEP_EVENTS, RequestTracer
from aiexport_edge.proto import engine_pb2 as pb

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    made = Collector()
    yield made
    made.close()


def body(**fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "max_tokens": 100, "messages": [{"role": "user", "content": "COUNT 5"}], **fields}


def test_a_request_is_a_span_of_its_caller_s_trace(
    collector: Collector, make_engine: Engines, make_shim: Shims
) -> None:
    engine = make_engine()
    shim = make_shim(
        engine,
        configure=lambda config: replace(config, telemetry=replace(config.telemetry, otlp_endpoint=collector.endpoint)),
    )
    with shim.client() as client:
        assert client.post("/v2/messages", json=body(), headers=CALLER).status_code == 200
        assert client.post("/v2/messages", json=body(max_tokens=0), headers=CALLER).status_code == 400
        assert client.get("/v2/models").status_code == 200
        assert client.get("/healthz").status_code == 200
    collector.wait_for(lambda spans: len(spans) == 3, "three spans, none of a probe")
    (service, span), (_, refused), (_, listed) = collector.spans
    assert service == "aiexport-edge-shim"
    assert span.name == "POST /v2/messages"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.trace_state == "vendor=1"
    facts = attributes(span)
    assert facts["http.response.status_code"] == 200
    assert (facts["gen_ai.request.model"], facts["gen_ai.usage.output_tokens"]) == (HAIKU, 5)
    assert facts["aiexport.workspace"] == "acme"
    assert "COUNT" not in str(span), "no prompt"
    assert shim.key.key not in str(span)
    assert attributes(refused)["http.response.status_code"] == 400
    assert not listed.parent_span_id
    assert listed.trace_id.hex() != TRACE
    metadata = engine.seen.submitted[0].request.metadata
    assert metadata["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert metadata["tracestate"] == "vendor=1"


def test_without_a_collector_nothing_is_traced(shared: tuple[ShimServer, ScriptedEngine]) -> None:
    shim, engine = shared
    with shim.client() as client:
        assert client.post("/v2/messages", json=body(), headers=CALLER).status_code == 200
    assert not engine.seen.submitted[-1].request.metadata


def test_a_collector_that_is_away_holds_up_nothing(make_engine: Engines, make_shim: Shims, tmp_path: Path) -> None:
    shim = make_shim(
        make_engine(),
        configure=lambda config: replace(
            config, telemetry=replace(config.telemetry, otlp_endpoint="http://127.0.0.1:1")
        ),
    )
    with shim.client() as client:
        for _ in range(20):
            assert client.post("/v2/messages", json=body()).status_code == 200


def test_the_engine_s_span_tells_of_its_steps(collector: Collector) -> None:
    tracer = RequestTracer(collector.endpoint)
    request = pb.GenerateRequest(request_id="req_1", model="demo", metadata=CALLER)
    assert tracer.begin(pb.GenerateRequest(request_id="req_0")) is None, "its client does not trace it"
    trace = tracer.begin(request)
    assert trace is not None
    trace.accepted(12, 500)
    trace.started(4)
    for _ in range(300):
        trace.step(2)
    trace.end("FINISH_MAX_TOKENS", cached_tokens=4, output_tokens=600)
    broken = tracer.begin(request)
    assert broken is not None
    broken.end("failed", cached_tokens=0, output_tokens=0)
    tracer.close()
    (service, span), (_, failed) = collector.spans
    assert service == "aiexport-edge-engine"
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("generate", TRACE, PARENT)
    names = [event.name for event in span.events]
    assert names == ["accepted", "scheduled", *["step"] * MAX_STEP_EVENTS]
    assert attributes(span.events[2]).keys() == {"index", "tokens", "ms"}
    facts = attributes(span)
    assert (facts["aiexport.steps"], facts["gen_ai.usage.output_tokens"]) == (300, 600)
    assert facts["aiexport.step_ms.max"] >= facts["aiexport.step_ms.mean"]
    assert span.status.code == 0
    assert failed.status.code == 2
