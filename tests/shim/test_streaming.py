"""A stream on the wire: events, headers, pings, errors after the first byte, clients that leave or do not read."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines import generation
from aiexport_edge.shim.errors import Overloaded

EVENT = re.compile(rb"event: ([a-z_]+)\ndata: ([^\n]*)\n\n")
Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]


def message(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": text}], **fields}


def events(body: bytes) -> list[dict[str, Any]]:
    """Parses a whole stream strictly: nothing but events, each with its own name as `type`."""
    found = [(name, json.loads(data)) for name, data in EVENT.findall(body)]
    assert b"".join(b"event: %s\ndata: %s\n\n" % pair for pair in EVENT.findall(body)) == body
    assert all(data["type"] == name.decode() for name, data in found)
    return [data for _, data in found]


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(e["delta"]["text"] for e in found if e["type"] == "content_block_delta")


def raw_post(
    shim: ShimServer, body: dict[str, Any], path: str = "/v2/messages/stream", *, headers: str = ""
) -> socket.socket:
    """A connection on which a request has been sent and nothing been read."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(shim.address(), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {shim.key.key}\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(f"{head}{headers}\r\n".encode() + content)
    return connection


def read_until(connection: socket.socket, wanted: bytes) -> bytes:
    received = b""
    deadline = time.monotonic() + 20
    while wanted not in received:
        assert time.monotonic() < deadline, received
        piece = connection.recv(65536)
        assert piece, received
        received += piece
    return received


@pytest.mark.parametrize(
    ("path", "stream"), [("/v2/messages/stream", False), ("/v2/messages", True), ("/v1/messages", True)]
)
def test_events_and_headers(shim: ShimServer, path: str, stream: bool) -> None:
    with shim.client() as client:
        reply = client.post(path, json=message("COUNT 50 é🦊", stream=stream, max_tokens=40))
        whole = client.post("/v2/messages", json=message("COUNT 50 é🦊", max_tokens=40)).json()
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    found = events(reply.content)
    kinds = [event["type"] for event in found]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    start = found[0]["message"]
    assert start["id"].startswith("msg_")
    assert start | {"id": ""} == {
        "id": "",
        "type": "message",
        "role": "assistant",
        "model": HAIKU,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "cache_read_input_tokens": 0, "output_tokens": 0},
    }
    assert found[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert found[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert found[-2]["usage"] == {"output_tokens": 40}
    assert text_of(found) == "".join(f"{i}é🦊 " for i in range(40)) == whole["content"][0]["text"]
    assert whole["stop_reason"] == "max_tokens"
    assert whole["usage"] == {"input_tokens": 7, "cache_read_input_tokens": 0, "output_tokens": 40}


def test_line_breaks_stay_inside_one_data_line(shim: ShimServer) -> None:
    with shim.client() as client:
        unit = '\\n\r\n\u2028\u0085\x1e"data:'  # split() would cut real line breaks, so these stay in one word
        unit = unit.replace("\r\n", "").replace("\u2028", "").replace("\u0085", "").replace("\x1e", "")
        found = events(client.post("/v2/messages/stream", json=message(f"COUNT 3 {unit}")).content)
    assert text_of(found) == "".join(f"{i}{unit} " for i in range(3))


def test_stop_sequence_and_cached_tokens(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    engine.cached_tokens = 4
    with make_shim(engine).client() as client:
        reply = client.post("/v2/messages", json=message("COUNT 3", stop_sequences=["zz", "2 "])).json()
        assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "2 ")
        assert reply["usage"] == {"input_tokens": 2, "cache_read_input_tokens": 4, "output_tokens": 3}
        found = events(client.post("/v2/messages/stream", json=message("COUNT 3", stop_sequences=["2 "])).content)
        assert found[0]["message"]["usage"]["cache_read_input_tokens"] == 4
        assert found[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "2 "}


def test_a_reply_without_text(shim: ShimServer) -> None:
    with shim.client() as client:
        found = events(client.post("/v2/messages/stream", json=message("COUNT 0")).content)
        assert [event["type"] for event in found] == [
            "message_start",
            "content_block_start",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        whole = client.post("/v2/messages", json=message("COUNT 0")).json()
        assert whole["content"] == [{"type": "text", "text": ""}]
        assert whole["usage"]["output_tokens"] == 0


def test_what_reaches_the_engine(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    with shim.client() as client:
        body = message("a", max_tokens=9, temperature=0.5, top_p=0.25, top_k=7, seed=2**64 - 1, system="be brief")
        body["messages"] += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
        first = client.post("/v2/messages", json=body | {"stop_sequences": ["é"]})
        client.post("/v2/messages", json=message("a", top_p=0))
        client.post("/v2/messages", json=message("a"))
    requests = [submit.request for submit in engine.seen.submitted]
    request = requests[0]
    assert request.request_id == first.headers["request-id"]
    assert request.model == "demo"
    turns = [(m.role, [block.text for block in m.content]) for m in request.chat.messages]
    assert turns == [
        (pb.ROLE_SYSTEM, ["be brief"]),
        (pb.ROLE_USER, ["a"]),
        (pb.ROLE_ASSISTANT, ["b"]),
        (pb.ROLE_USER, ["c"]),
    ]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.25, 7, 2**64 - 1)
    assert list(sampling.stop_sequences) == ["é"]
    assert request.max_tokens == 9
    assert request.priority == pb.PRIORITY_INTERACTIVE
    assert request.tenant.id == shim.store.get_workspace("acme").id
    assert request.tenant.weight == shim.config.plans["enterprise"].weight
    assert len(request.tenant.cache_salt) == 16
    assert 0 < requests[1].sampling.top_p < 1e-37  # the engine knows no 0; so little leaves the likeliest token alone
    plain = requests[2]
    assert not plain.HasField("max_tokens")
    assert not plain.sampling.HasField("top_p")
    assert not plain.sampling.HasField("top_k")
    assert plain.sampling.temperature == 1.0
    assert plain.sampling.HasField("seed")  # the shim draws one, so that a resubmission draws the same
    assert requests[1].sampling.seed != plain.sampling.seed


def test_pings_before_the_start_and_between_events(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine, ping_s=0.05)
    engine.pause()
    engine.hold_starts(True)
    with raw_post(shim, message("COUNT 3")) as connection:
        before = read_until(connection, b"ping")
        assert b"message_start" not in before
        engine.hold_starts(False)
        engine.permit(1)
        read_until(connection, b"content_block_delta")
        read_until(connection, b"ping")
        engine.free_run()
        engine.permit(1)
        read_until(connection, b"message_stop")


def test_refusals_are_real_statuses(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    refusals = [
        (pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL, retry_after_ms=2500), 503, "overloaded_error", "3"),
        (pb.ErrorDetail(code=pb.ERROR_TENANT_QUEUE_FULL), 429, "rate_limit_error", "2"),
        (pb.ErrorDetail(code=pb.ERROR_NOT_FOUND), 503, "overloaded_error", "2"),
        (pb.ErrorDetail(code=pb.ERROR_INTERNAL, message="/secret/path"), 500, "api_error", None),
        (
            pb.ErrorDetail(code=pb.ERROR_INVALID, message="bad", field="sampling.top_k"),
            400,
            "invalid_request_error",
            None,
        ),
    ]
    with shim.client() as client:
        for detail, status, kind, retry_after in refusals:
            engine.refuse = detail
            for path in ("/v2/messages", "/v2/messages/stream"):
                reply = client.post(path, json=message("x"))
                assert reply.status_code == status
                assert reply.json()["error"]["type"] == kind
                assert reply.headers.get("retry-after") == retry_after
                assert "secret" not in reply.text
        assert reply.json()["error"]["param"] == "top_k"
        engine.refuse = None
        assert client.post("/v2/messages", json=message("x")).status_code == 200


def test_an_engine_that_never_answers(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine, answer_timeout_s=0.1)
    engine.accept_silently = True
    with shim.client() as client:
        assert client.post("/v2/messages", json=message("x")).status_code == 503
    engine.wait_for(lambda seen: len(seen.aborted) == 1, "the abort")


def test_a_failure_after_the_first_byte(make_engine: Engines, make_shim: Shims) -> None:
    """An error event ends the stream; a whole reply is a 500. Neither tells what the engine said."""
    engine = make_engine()
    shim = make_shim(engine)
    engine.fail_after = (3, pb.ErrorDetail(code=pb.ERROR_INTERNAL, message="CUDA error at /usr/lib"))
    with shim.client() as client:
        reply = client.post("/v2/messages/stream", json=message("COUNT 9"))
        assert reply.status_code == 200
        found = events(reply.content)
        assert text_of(found) == "0 1 2 "
        assert found[-1]["type"] == "error"
        assert found[-1]["error"]["type"] == "api_error"
        assert found[-1]["request_id"] == reply.headers["request-id"]
        whole = client.post("/v2/messages", json=message("COUNT 9"))
        assert whole.status_code == 500
        assert "CUDA" not in reply.text + whole.text


@pytest.mark.parametrize("path", ["/v2/messages/stream", "/v2/messages"])
@pytest.mark.parametrize("phase", ["queued", "running"])
def test_a_client_that_leaves_is_aborted(make_engine: Engines, make_shim: Shims, path: str, phase: str) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    engine.hold_starts(phase == "queued")
    connection = raw_post(shim, message("COUNT 500"), path)
    engine.wait_for(lambda seen: len(seen.submitted) == 1, "the request")
    if phase == "running":
        engine.permit(5)
        if path.endswith("stream"):
            read_until(connection, b'4 "')
    connection.close()
    engine.wait_for(lambda seen: seen.aborted == [seen.submitted[0].tag], "the abort")
    until(lambda: not any(session.live for session in shim.engines.sessions), "nothing of it is left")
    until(lambda: shim.services.bodies.used == 0, "its body is let go")


@pytest.mark.parametrize("headers", ["", "Idempotency-Key: left\r\n"], ids=["plain", "idempotent"])
def test_a_client_that_leaves_after_a_large_body(make_engine: Engines, make_shim: Shims, headers: str) -> None:
    """So large that the connection was paused while it came: what is not read any more tells of no end."""
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    connection = raw_post(shim, message("COUNT 500", system="x" * 400_000), headers=headers)
    engine.wait_for(lambda seen: len(seen.submitted) == 1, "the request")
    engine.permit(2)
    read_until(connection, b'1 "')
    connection.close()
    engine.wait_for(lambda seen: seen.aborted == [seen.submitted[0].tag], "the abort")
    until(lambda: shim.services.bodies.used == 0, "its body is let go")


def test_a_client_that_leaves_before_it_is_accepted(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.accept_silently = True
    connection = raw_post(shim, message("x"))
    engine.wait_for(lambda seen: len(seen.submitted) == 1, "the request")
    connection.close()
    engine.wait_for(lambda seen: len(seen.aborted) == 1, "the abort")


def test_a_client_that_does_not_read(make_engine: Engines, make_shim: Shims) -> None:
    """It loses its own stream once its buffer is full; others on the same session never wait for it."""
    engine = make_engine()
    shim = make_shim(engine)
    unit = "x" * 4000
    with raw_post(shim, message(f"COUNT 2000 {unit}", max_tokens=2000)) as stuck, shim.client() as client:
        engine.wait_for(lambda seen: len(seen.aborted) == 1, "the slow reader is aborted")
        some = "y" * 1000  # all of it fits into the buffer: however slowly this process runs, it is no slow reader
        found = events(client.post("/v2/messages/stream", json=message(f"COUNT 200 {some}")).content)
        assert text_of(found) == "".join(f"{i}{some} " for i in range(200))
        total = 0
        while piece := stuck.recv(1 << 20):  # what had been sent arrives, then nothing more
            total += len(piece)
            tail = piece
        assert total > generation.MAX_BUFFERED_BYTES // 4
        assert b"message_stop" not in tail
        assert not tail.endswith(b"0\r\n\r\n")


def test_many_streams_at_once(make_engine: Engines, make_shim: Shims) -> None:
    """64 streams over one session, each with its own text."""
    engine = make_engine()
    shim = make_shim(engine)

    async def one(client: httpx.AsyncClient, i: int) -> str:
        reply = await client.post("/v2/messages/stream", json=message(f"COUNT {20 + i} -{i}"))
        return text_of(events(reply.content))

    async def all_of_them() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        headers = {"X-API-Key": shim.key.key}
        async with httpx.AsyncClient(base_url=shim.base_url, headers=headers, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(one(client, i) for i in range(64)))

    texts = asyncio.run(all_of_them())
    assert texts == ["".join(f"{j}-{i} " for j in range(20 + i)) for i in range(64)]
    assert len(engine.seen.hellos) == 1


def test_a_connection_serves_many_requests(shim: ShimServer) -> None:
    """Kept alive over streams, errors and whole replies alike."""
    with shim.client() as client:
        opened = []
        request = client.build_request("GET", "/healthz")
        request.extensions["trace"] = lambda name, info: (
            opened.append(name) if name.startswith("connect_tcp.s") else None
        )
        for _ in range(2):
            client.post("/v2/messages/stream", json=message("COUNT 2"))
            client.post("/v2/messages", json=message("COUNT 2"))
            client.post("/v2/messages", content=b"{")
        assert client.send(request).status_code == 200
        assert opened == []


def test_two_requests_sent_together(shim: ShimServer) -> None:
    """Pipelined on one connection, answered in order."""
    content = json.dumps(message("COUNT 2")).encode()
    head = (
        f"POST /v2/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {shim.key.key}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(shim.address(), timeout=60) as connection:
        connection.sendall((head.encode() + content) * 2)
        received = b""
        while received.count(b'"usage"') < 2:
            received += connection.recv(65536)
    assert received.count(b"HTTP/1.1 200 OK") == 2


def test_drain_ends_streams_with_an_error_event(make_engine: Engines, make_shim: Shims) -> None:
    """What can't be waited for any longer is told so."""
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    engine.permit(2)
    with raw_post(shim, message("COUNT 9")) as connection:
        read_until(connection, b"content_block_delta")
        shim.loop.call_soon_threadsafe(shim.engines.end_all, Overloaded("bye"))
        tail = read_until(connection, b"0\r\n\r\n")
    assert b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"bye"}' in tail
    engine.wait_for(lambda seen: len(seen.aborted) == 1, "the abort")
