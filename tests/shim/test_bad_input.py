"""What a client can get wrong, over a real socket: the contract's status, the error shape, never a 5xx."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.scripted_engine import CONTEXT_WINDOW, MAX_OUTPUT_TOKENS, ScriptedEngine
from support.shim_server import HAIKU, ShimServer

from aiexport_edge.shim import body as body_module
from aiexport_edge.shim import http_protocol

USER = [{"role": "user", "content": "COUNT 2"}]
DATA = Path(os.environ.get("AIEXPORT_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SUITE = DATA / "json" / "JSONTestSuite" / "test_parsing"
PATHS = ("/v2/messages", "/v2/messages/stream", "/v1/messages")


def message(**fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "messages": USER, **fields}


def raw(fields: bytes) -> bytes:
    return b'{"model":"' + HAIKU.encode() + b'","messages":[{"role":"user","content":"x"}]' + fields + b"}"


def check_error(reply: httpx.Response, status: int, kind: str, param: str | None = None) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    document: dict[str, Any] = reply.json()
    assert set(document) == {"type", "error", "request_id"}
    assert document["type"] == "error"
    assert document["error"]["type"] == kind
    assert document["error"].get("param") == param
    assert document["request_id"].startswith("req_")
    assert document["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    assert reply.headers["content-type"] == "application/json"
    assert "Traceback" not in reply.text
    assert "/" not in document["error"]["message"].replace("/v2/models", "").replace("application/json", "")
    return document


BAD: list[tuple[str, bytes | dict[str, Any] | list[Any], str | None]] = [
    ("not JSON", b"{nope", None),
    ("not an object", [1], None),
    ("empty", b"", None),
    ("comment", b"/* */ {}", None),
    ("NaN", raw(b',"temperature":NaN'), None),
    ("not UTF-8", b'{"model":"\xff"}', None),
    ("10,000 arrays", raw(b',"x":' + b"[" * 10_000 + b"]" * 10_000), None),
    ("100,000 arrays", b"[" * 100_000, None),
    ("5,000 digits", raw(b',"max_tokens":' + b"9" * 5000), "max_tokens"),
    ("minus 5,000 digits", raw(b',"seed":-' + b"9" * 5000), "seed"),
    ("1e999", raw(b',"temperature":1e999'), "temperature"),
    ("lone surrogate", raw(b',"system":"\\ud800"'), "system"),
    ("wrong type", message(messages="x"), "messages"),
    ("empty messages", message(messages=[]), "messages"),
    ("unknown role", message(messages=[{"role": "bot", "content": "x"}]), "messages.0.role"),
    ("unknown block", message(messages=[{"role": "user", "content": [{"type": "x"}]}]), "messages.0.content.0.type"),
    ("tools", message(tools=[{"name": "x"}]), "tools"),
    ("temperature 1.5", message(temperature=1.5), "temperature"),
    ("max_tokens 0", message(max_tokens=0), "max_tokens"),
    ("max_tokens over the model's limit", message(max_tokens=MAX_OUTPUT_TOKENS + 1), "max_tokens"),
    ("JSON mode", message(response_format={"type": "json_object"}), "response_format.type"),
]


@pytest.mark.parametrize(("body", "param"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_bodies(shim: ShimServer, body: Any, param: str | None) -> None:
    with shim.client() as client:
        for path in PATHS:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            check_error(client.post(path, content=content), 400, "invalid_request_error", param)


def test_prompt_longer_than_the_context(shim: ShimServer) -> None:
    with shim.client() as client:
        body = message(messages=[{"role": "user", "content": "word " * 5000}])
        document = check_error(client.post("/v2/messages", json=body), 400, "invalid_request_error", "messages")
    assert str(CONTEXT_WINDOW) in document["error"]["message"]
    assert "at least 5004 tokens" in document["error"]["message"]  # an engine stops counting somewhere


def test_unknown_model(shim: ShimServer) -> None:
    with shim.client() as client:
        for model in ("nope", "ft-acme-x", "", "\x00\n\u202e" + "x" * 1000):
            check_error(client.post("/v2/messages", json=message(model=model)), 404, "not_found_error", "model")


def test_ignored_fields_do_not_matter(shim: ShimServer) -> None:
    """Whatever JSON allows is fine where nobody looks."""
    with shim.client() as client:
        for extra in (
            b',"x":' + b"9" * 5000,
            b',"x":"\\ud800"',
            b',"max_tokens":0,"max_tokens":5',
            b',"metadata":{"user_id":"\\udfff"}',
            b',"tools":null,"thinking":null,"temperature":null',
            b',"\\u0000":1',
        ):
            assert client.post("/v2/messages", content=raw(extra)).status_code == 200


@pytest.mark.skipif(not SUITE.is_dir(), reason=f"no JSONTestSuite in {SUITE}; set AIEXPORT_TEST_DATA")
def test_json_test_suite_over_the_wire(shim: ShimServer) -> None:
    """Every case is a 400, alone and as a field's value where it is JSON that a field may hold."""
    with shim.client() as client:
        for case in sorted(SUITE.glob("*.json")):
            body = case.read_bytes()
            check_error(client.post("/v2/messages", content=body), 400, "invalid_request_error", *_param_of(body))
            reply = client.post("/v2/messages", content=raw(b',"max_tokens":2,"x":' + body))
            if case.name.startswith("y_"):
                assert reply.status_code == 200, case.name
            else:
                assert reply.status_code in (200, 400), case.name


def _param_of(body: bytes) -> tuple[str, ...]:
    """An object is missing its model; anything else has no field to name."""
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError):
        return ()
    return ("model",) if isinstance(value, dict) else ()


@pytest.mark.parametrize("path", PATHS)
def test_content_types(shim: ShimServer, path: str) -> None:
    body = json.dumps(message(max_tokens=1)).encode()
    with shim.client() as client:
        for declared in ("application/json", "text/plain;charset=UTF-8", "application/vnd.api+json", ""):
            assert client.post(path, content=body, headers={"content-type": declared}).status_code == 200
        assert client.post(path, content=body).status_code == 200
        for declared in ("application/xml", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
            reply = client.post(path, content=body, headers={"content-type": declared})
            check_error(reply, 415, "invalid_request_error")
        reply = client.post(path, content=body, headers={"content-encoding": "gzip"})
        check_error(reply, 415, "invalid_request_error")


def test_methods_and_paths(shim: ShimServer) -> None:
    with shim.client() as client:
        for method, path in [
            ("GET", "/v2/messages"),
            ("PUT", "/v2/messages/stream"),
            ("DELETE", "/v2/models"),
            ("POST", "/v2/models/x"),
            ("OPTIONS", "/v1/messages"),
            ("POST", "/healthz"),
        ]:
            reply = client.request(method, path)
            check_error(reply, 405, "invalid_request_error")
            assert reply.headers["allow"]
        for path in (
            "/",
            "/v2",
            "/v2/",
            "/v2/messages/",
            "/v2/nothing",
            "/v3/messages",
            "/metrics",
            "/console",
            "/v1/messages/stream",
        ):
            for method in ("GET", "POST"):
                check_error(client.request(method, path), 404, "not_found_error")
        assert client.head("/healthz").status_code == 200


BIG = 33 << 20


def test_body_over_the_limit_is_refused_by_its_length(shim: ShimServer) -> None:
    """413 before the body is read; the connection lives on, its body thrown away."""
    with shim.client() as client:
        for path in PATHS:
            check_error(client.post(path, content=b"x" * BIG), 413, "request_too_large")
        assert client.get("/v2/models").status_code == 200


def test_chunked_body_over_the_limit(shim: ShimServer) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(BIG >> 20):
            yield b" " * (1 << 20)

    with shim.client() as client:
        check_error(client.post("/v2/messages", content=chunks()), 413, "request_too_large")
        assert client.get("/v2/models").status_code == 200
    assert shim.services.bodies.used == 0


def test_body_bytes_in_flight_are_bounded(
    make_engine: Callable[..., ScriptedEngine], make_shim: Callable[..., ShimServer]
) -> None:
    """What all requests hold together has a limit too; past it a request is sent away, and comes back later."""
    engine = make_engine()
    shim = make_shim(engine, max_body_bytes=10_000, inflight_body_bytes=15_000)
    engine.hold_starts(True)
    body = json.dumps(message(x="y" * 9000)).encode()
    with shim.client() as client, client.stream("POST", "/v2/messages/stream", content=body) as first:
        assert first.status_code == 200
        reply = client.post("/v2/messages", content=body)
        check_error(reply, 503, "overloaded_error")
        assert int(reply.headers["retry-after"]) >= 1
        check_error(client.post("/v2/messages", content=b"x" * 10_001), 413, "request_too_large")
        engine.hold_starts(False)
        first.read()
        assert client.post("/v2/messages", content=body).status_code == 200
    assert shim.services.bodies.used == 0


def test_a_prompt_that_no_engine_takes(
    make_engine: Callable[..., ScriptedEngine], make_shim: Callable[..., ShimServer]
) -> None:
    """With a larger body allowed than an engine's messages may be: refused here, the session lives on."""
    engine = make_engine()
    shim = make_shim(engine, max_body_bytes=64 << 20)
    with shim.client() as client:
        body = message(messages=[{"role": "user", "content": "x" * (34 << 20)}])
        check_error(client.post("/v2/messages", json=body), 413, "request_too_large")
        assert client.post("/v2/messages", json=message()).status_code == 200
    assert len(engine.seen.hellos) == 1


def test_a_head_that_does_not_end(shim: ShimServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that sends nothing, or a request's head without an end, is closed; also after a first request."""
    with socket.create_connection(shim.address(), timeout=60) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in connection.recv(4096)
        monkeypatch.setattr(http_protocol, "HEAD_S", 0.1)
        connection.sendall(b"GET /hea")
        while connection.recv(100):  # the rest of the first reply, where it came in two pieces
            pass
    for sent in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection(shim.address(), timeout=60) as connection, suppress(ConnectionError):
            connection.sendall(sent)
            assert connection.recv(100) == b""


def test_a_body_that_does_not_arrive(shim: ShimServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "IDLE_S", 0.1)
    head = f"POST /v2/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nX-API-Key: {shim.key.key}\r\n\r\n"
    received = exchange(shim, head.encode() + b'{"model"')
    assert received.startswith(b"HTTP/1.1 400")
    assert b"did not arrive" in received
    assert b"connection: close" in received


def exchange(shim: ShimServer, sent: bytes) -> bytes:
    """Sends bytes and reads one whole reply, or what comes before the server closes or breaks off."""
    received = b""
    with socket.create_connection(shim.address(), timeout=60) as connection, suppress(ConnectionError):
        connection.sendall(sent)
        while piece := connection.recv(65536):
            received += piece
            head, _, body = received.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            if length and len(body) >= int(length[1]):
                break
    return received


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v2/messages HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v2/messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"a" * 100_000,
    ],
    ids=["garbage", "version", "path bytes", "length", "both lengths", "long header", "many headers", "long path"],
)
def test_what_is_not_http(shim: ShimServer, sent: bytes) -> None:
    """Ends in a 400 in the error shape and a closed connection, or in an ordinary 4xx; the server goes on."""
    received = exchange(shim, sent)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4"), received[:200]
    assert b"request-id: req_" in head
    assert json.loads(body)["type"] == "error"
    assert httpx.get(f"{shim.base_url}/healthz").status_code == 200
