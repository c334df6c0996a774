"""A trace from the caller, over TLS, through the REST front to the engine's steps, in a whole installation."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.certificates import write_certificate
from support.edge import message, start, wait_until
from support.otlp import Collector, attributes

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def test_one_trace_over_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    collector = Collector()
    config = tmp_path / "aiexport-edge.toml"
    ca, _ = write_certificate(tmp_path, "127.0.0.1")
    config.write_text(
        f'[tls]\ncert = "cert.pem"\nkey = "key.pem"\n'
        f'[telemetry]\notlp_endpoint = "{collector.endpoint}"\nlog_format = "json"\n'
    )
    edge = start(tmp_path / "state", config, ca=ca)
    try:
        with edge.client() as client:
            body = message("Tell me a story.", max_tokens=20, temperature=0)
            headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            reply = client.post("/v2/messages", json=body, headers=headers).json()
            batch = client.post("/v2/batch", json={"requests": [body]}).json()
            wait_until(
                lambda: client.get(f"/v2/batch/{batch['id']}").json()["status"] == "completed", "the batch has ended"
            )
        collector.wait_for(lambda spans: any(span.name == "batch request" for _, span in spans), "the batch's span")
        collector.wait_for(lambda spans: len(spans) >= 2, "the spans of both processes")
    finally:
        assert edge.stop() == 0
        collector.close()
    assert f"serves https://127.0.0.1:{edge.port}/v2" in "".join(edge.stdout)
    spans = {service: span for service, span in collector.spans if span.trace_id.hex() == TRACE}
    shim, engine = spans["aiexport-edge-shim"], spans["aiexport-edge-engine"]
    assert shim.parent_span_id.hex() == CALLER
    assert engine.parent_span_id == shim.span_id
    assert shim.start_time_unix_nano <= engine.start_time_unix_nano <= engine.end_time_unix_nano
    names = [event.name for event in engine.events]
    assert names[:2] == ["accepted", "scheduled"]
    assert set(names[2:]) == {"step"}
    output = reply["usage"]["output_tokens"]
    assert attributes(engine)["gen_ai.usage.output_tokens"] == attributes(shim)["gen_ai.usage.output_tokens"] == output
    assert sum(attributes(event)["tokens"] for event in engine.events[2:]) >= output
    batched = next(span for _, span in collector.spans if span.name == "batch request")
    assert attributes(batched)["aiexport.batch_id"] == batch["id"]
    assert attributes(batched)["gen_ai.usage.output_tokens"] == output
    of_batch = [span for _, span in collector.spans if span.parent_span_id == batched.span_id]
    assert [attributes(span)["gen_ai.usage.output_tokens"] for span in of_batch] == [output]
    assert "story" not in str(collector.spans)
