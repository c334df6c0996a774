"""The listener on an open network: heads, connections, slow bodies, readers that stand still, TLS, other origins."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from support.certificates import write_certificate
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto.config import Config
from aiexport_edge.proto.config_tls import TlsConfig
from aiexport_edge.shim import body, http_protocol, tls
from aiexport_edge.shim.tls import Certificate, CertificateError

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
ADDRESS = "127.0.0.1"


def raw(shim: ShimServer) -> socket.socket:
    return socket.create_connection(shim.address(), timeout=60)


def until_closed(connection: socket.socket) -> bytes:
    """What comes before the other side closes, or breaks off where it had not read all of ours."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return received


def shim_with(**changes: object) -> Callable[[Config], Config]:
    return lambda config: replace(config, shim=replace(config.shim, **changes))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-filler: " + b"a" * (65 << 10),
        b"GET /v2/models?x="
        + b"a" * (65 << 10)
        + b" HTTP/1.1\r\nhost: x\r\n\r\n",  # the parser takes none of that length
    ],
    ids=["headers", "URL"],
)
def test_headers_that_are_too_large_are_a_431(shim: ShimServer, sent: bytes) -> None:
    with raw(shim) as connection:
        connection.sendall(sent)
        reply = until_closed(connection)
    assert reply.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert b'"type":"invalid_request_error"' in reply
    assert b"request-id: req_" in reply


def test_one_connection_too_many_is_told_so(make_engine: Engines, make_shim: Shims) -> None:
    """The others go on; when one ends there is room again."""
    shim = make_shim(make_engine(), configure=shim_with(max_connections=8))
    connections = shim.servers[0].server_state.connections
    until(lambda: not connections, "the probes' connections are gone")
    held = [raw(shim) for _ in range(8)]
    until(lambda: len(connections) == 8, "they are there")
    try:
        with raw(shim) as extra:
            extra.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            refused = until_closed(extra)
            assert refused.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b'"type":"overloaded_error"' in refused
            assert b"retry-after: 1\r\n" in refused
        held[0].sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert held[0].recv(65536).startswith(b"HTTP/1.1 200 OK")
    finally:
        for each in held:
            each.close()
    until(lambda: not connections, "they are gone")
    assert httpx.get(f"{shim.base_url}/healthz").status_code == 200


def test_a_head_that_never_ends_is_given_up(shim: ShimServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.2)
    with raw(shim) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert until_closed(connection) == b""


def test_a_body_that_trickles_is_given_up(shim: ShimServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then does not keep the place for ever."""
    monkeypatch.setattr(body, "IDLE_S", 0.5)
    with raw(shim) as connection:
        head = f"POST /v2/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {shim.key.key}\r\ncontent-length: 100000\r\n\r\n"
        connection.sendall(head.encode())
        connection.settimeout(0.02)
        received = b""
        while b"\r\n\r\n" not in received:
            try:
                received += connection.recv(65536)
            except TimeoutError:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"{")
    assert received.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close" in received


def test_the_rest_of_a_body_that_nobody_wants_is_given_up(shim: ShimServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials, a byte now and then held a connection for ever."""
    monkeypatch.setattr(http_protocol, "REST_S", 0.3)
    with raw(shim) as connection:
        connection.sendall(b"POST /v2/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{")
        received = b""
        while b'"request_id"' not in received:
            received += connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 401 ")
        connection.settimeout(0.02)
        closed = False
        while not closed:
            try:
                connection.sendall(b"{")
                closed = not connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                closed = True


def test_a_client_that_does_not_read_is_given_up(
    make_engine: Engines, make_shim: Shims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for ever more and takes nothing: the replies must not pile up here."""
    monkeypatch.setattr(http_protocol, "STALL_S", 0.3)
    shim = make_shim(make_engine())
    state = shim.servers[0].server_state
    until(lambda: not state.connections, "the probes' connections are gone")
    request = f"GET /v2/models HTTP/1.1\r\nhost: x\r\nx-api-key: {shim.key.key}\r\n\r\n".encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(shim.address())
        until(lambda: len(state.connections) == 1, "it is there")
        before = state.total_requests
        sent = 0
        while state.connections:
            try:
                connection.sendall(request * 10)
            except ConnectionError:
                break
            sent += 10
            until(lambda: state.total_requests >= before + sent or not state.connections, "answered or given up")  # noqa: B023
        until(lambda: not state.connections, "it is given up")
        assert sent * 1000 < 64 << 20


def test_pipelined_requests_are_answered_in_order_and_bounded(
    shim: ShimServer, caplog: pytest.LogCaptureFixture
) -> None:
    with raw(shim) as connection:
        connection.sendall(b"".join(b"GET /v2/%d HTTP/1.1\r\nhost: x\r\n\r\n" % n for n in range(20)))
        received = b""
        while received.count(b"HTTP/1.1 404") < 20:
            received += connection.recv(65536)
    with raw(shim) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n" * 1000)
        assert until_closed(connection).count(b"HTTP/1.1 200") < 100
    until(lambda: not shim.servers[0].server_state.tasks, "nothing is left")
    assert "Traceback" not in caplog.text


def test_compressed_bodies_are_not_taken(shim: ShimServer) -> None:
    """So that none can unfold here."""
    with shim.client() as client:
        for encoding in ("gzip", "br", "deflate", "zstd"):
            reply = client.post("/v2/messages", content=b"x", headers={"content-encoding": encoding})
            assert reply.status_code == 415


# ---------------------------------------------------------------------------------------------------- other clients

COUNT = f'{{"model":"{HAIKU}","messages":[{{"role":"user","content":"COUNT 3"}}]}}'.encode()


def post(shim: ShimServer, body: bytes, *headers: str, path: str = "/v2/messages", version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "host: x", f"x-api-key: {shim.key.key}", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


@pytest.mark.parametrize("pieces", [1, 2, 300])
def test_an_offer_of_http_2_costs_no_body(shim: ShimServer, pieces: int) -> None:
    """Java's client and `curl --http2` offer an upgrade with each request over plain HTTP; it may be ignored
    (RFC 9110, 7.8). The parser took the body for the other protocol's: every POST of theirs was an empty one."""
    offer = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__")
    chunked = b"POST /v2/messages HTTP/1.1\r\nhost: x\r\nx-api-key: %b\r\n%b\r\ntransfer-encoding: chunked\r\n\r\n" % (
        shim.key.key.encode(),
        "\r\n".join(offer).encode(),
    )
    sent = post(shim, COUNT, *offer)
    sent += chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(COUNT), COUNT)
    sent += f"GET /healthz HTTP/1.1\r\nhost: x\r\n{offer[0]}\r\n{offer[1]}\r\n\r\n".encode()
    sent += post(shim, COUNT, "connection: close")
    size = -(-len(sent) // pieces)
    with raw(shim) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(sent), size):
            connection.sendall(sent[start : start + size])
        received = until_closed(connection)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 4
    assert received.count(b'"type":"message"') == 3


def test_http_1_0_gets_no_chunks(shim: ShimServer) -> None:
    """It knows none (RFC 9112, 7.1): the body ends with the connection."""
    for path, last in (("/v2/messages/stream", b'data: {"type":"message_stop"}\n\n'), ("/v2/messages", b"}")):
        with raw(shim) as connection:
            connection.sendall(post(shim, COUNT, path=path, version="1.0"))
            head, _, body = until_closed(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"transfer-encoding" not in head
        assert body.startswith((b"event: message_start\n", b"{"))
        assert body.endswith(last)


def test_what_is_wrong_behind_a_request_takes_nothing_from_its_reply(shim: ShimServer) -> None:
    """A client that counts characters for bytes says too small a length: it heard nothing of what was wrong."""
    text = f'{{"model":"{HAIKU}","messages":[{{"role":"user","content":"COUNT 3 ééé"}}]}}'
    head = f"POST /v2/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {shim.key.key}\r\ncontent-length: {len(text)}\r\n\r\n"
    with raw(shim) as connection:
        connection.sendall(head.encode() + text.encode())
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"is not valid JSON" in received
    with raw(shim) as connection:
        connection.sendall(post(shim, COUNT) + post(shim, COUNT, path="/v2/messages/stream") + b"!" * 100_000)
        received = until_closed(connection)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == received.count(b"HTTP/1.1") == 2
    assert received.endswith(b'data: {"type":"message_stop"}\n\n\r\n0\r\n\r\n')


def test_a_body_that_breaks_the_protocol_is_told_so(shim: ShimServer) -> None:
    with raw(shim) as connection:
        head = (
            f"POST /v2/messages HTTP/1.1\r\nhost: x\r\nx-api-key: {shim.key.key}\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        connection.sendall(head.encode() + b"2\r\n{}\r\nzz\r\n")
        received = until_closed(connection)
    assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert received.count(b"HTTP/1.1") == 1
    assert b'"type":"invalid_request_error"' in received


# ---------------------------------------------------------------------------------------------------- TLS


def served_certificate(shim: ShimServer) -> bytes:
    """The one that a new connection gets, as DER."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with raw(shim) as connection, context.wrap_socket(connection) as wrapped:
        assert wrapped.version() in ("TLSv1.2", "TLSv1.3")
        der = wrapped.getpeercert(binary_form=True)
    assert der is not None
    return der


@pytest.fixture
def secure(tmp_path: Path, make_engine: Engines, make_shim: Shims, monkeypatch: pytest.MonkeyPatch) -> ShimServer:
    monkeypatch.setattr(tls, "LOOK_S", 0.05)
    cert, key = write_certificate(tmp_path, ADDRESS)
    return make_shim(make_engine(), configure=lambda config: replace(config, tls=TlsConfig(cert, key)))


def test_tls_and_a_renewed_certificate(secure: ShimServer, tmp_path: Path) -> None:
    body = {"model": HAIKU, "messages": [{"role": "user", "content": "COUNT 9"}]}
    with secure.client(verify=False) as client:
        assert secure.base_url.startswith("https://")
        assert "message_stop" in client.post("/v2/messages/stream", json=body).text
        first = served_certificate(secure)
        (tmp_path / "cert.pem").write_text("half written")
        assert served_certificate(secure) == first
        write_certificate(tmp_path, ADDRESS)
        until(lambda: served_certificate(secure) != first, "new connections get the new one")
        assert client.get("/v2/models").status_code == 200, "old connections go on"
    with raw(secure) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200 OK" not in until_closed(connection)


def test_what_is_wrong_with_a_certificate_is_said(tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, ADDRESS)
    with pytest.raises(CertificateError, match="No such file"):
        Certificate(tmp_path / "none.pem", key)
    (tmp_path / "other").mkdir()
    _, other = write_certificate(tmp_path / "other", ADDRESS)
    with pytest.raises(CertificateError, match="KEY_VALUES_MISMATCH"):
        Certificate(cert, other)
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(CertificateError, match="is encrypted"):
        Certificate(cert, key)


# ---------------------------------------------------------------------------------------------------- other origins

PAGE = "https://app.example.com"


@pytest.fixture
def open_shim(make_engine: Engines, make_shim: Shims) -> ShimServer:
    return make_shim(make_engine(), configure=shim_with(cors_origins=(PAGE,)))


def preflight(client: httpx.Client, origin: str) -> httpx.Response:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key,content-type"}
    return client.options("/v2/messages", headers={"Origin": origin, **asks})


def test_other_origins_are_off(shim: ShimServer) -> None:
    with shim.client() as client:
        assert preflight(client, PAGE).status_code == 405
        assert "access-control-allow-origin" not in client.get("/v2/models", headers={"Origin": PAGE}).headers


def test_a_configured_origin_may_call(open_shim: ShimServer) -> None:
    with open_shim.client() as client:
        allowed = preflight(client, PAGE)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE
        assert "x-api-key" in allowed.headers["access-control-allow-headers"]
        assert allowed.headers["request-id"].startswith("req_")
        refused = preflight(client, "https://evil.example")
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers
        assert refused.json()["error"]["type"] == "invalid_request_error"
        assert refused.json()["request_id"] == refused.headers["request-id"]
        for path, status in (("/v2/models", 200), ("/v2/nothing", 404)):
            reply = client.get(path, headers={"Origin": PAGE})
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == PAGE
            assert "retry-after" in reply.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in allowed.headers
    with open_shim.client("nonsense") as stranger:
        assert stranger.get("/v2/models", headers={"Origin": PAGE}).headers["access-control-allow-origin"] == PAGE


# ---------------------------------------------------------------------------------------------------- the log


@pytest.mark.parametrize("wanted", [False, True])
def test_prompts_are_logged_only_where_asked_for(
    wanted: bool, make_engine: Engines, make_shim: Shims, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiexport_edge.access")
    shim = make_shim(
        make_engine(),
        configure=lambda config: replace(config, telemetry=replace(config.telemetry, log_prompts=wanted)),
    )
    body = {"model": HAIKU, "messages": [{"role": "user", "content": "COUNT 3 umbrella"}]}
    with shim.client() as client:
        assert client.post("/v2/messages", json=body).status_code == 200
        assert client.post("/v2/messages", content=b"x " * 50_000).status_code == 400

    def access_lines() -> list[dict[str, str]]:
        return [vars(record)["fields"] for record in caplog.records if "POST /v2/messages" in record.getMessage()]

    until(lambda: len(access_lines()) == 2, "both lines are written")
    lines = access_lines()
    assert ["umbrella" in str(line) for line in lines] == [wanted, False]
    assert shim.key.key not in caplog.text
    if wanted:
        assert len(lines[1]["prompt"]) == 64 << 10
