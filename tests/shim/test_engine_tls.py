"""Certificates between shim and engine, over real sockets: who is let in, what is said where one is not, renewal."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from support.certificates import Authority
from support.edge import free_port
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.engine.server.listener import ListenerConfig, open_listener
from aiexport_edge.proto.engine_pb2_grpc import EngineServicer
from aiexport_edge.shim.engines.access import AccessError, Endpoint, EngineAccess, split_targets
from aiexport_edge.shim.engines.handshake import why_refused

TOKEN = "let me in"
Serve = Callable[..., str]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Engines' own listeners, on a loop in a thread: takes what ListenerConfig does, gives an address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    opened = []

    def open_one(servicer: EngineServicer | None = None, *, host: str = "127.0.0.1", **files: Path) -> str:
        config = ListenerConfig(f"{host}:0", **files)
        future = asyncio.run_coroutine_threadsafe(open_listener(config, servicer or EngineServicer()), loop)
        opened.append(future.result(30))
        return f"{host}:{opened[-1].port}"

    yield open_one
    for listener in opened:
        asyncio.run_coroutine_threadsafe(listener.close(0), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def access(authority: Authority, client: tuple[Path, Path] | None = None) -> EngineAccess:
    cert, key = client or (None, None)
    return EngineAccess(authority.file, cert, key)


def files(pair: tuple[Path, Path], client_ca: Path | None = None) -> dict[str, Path]:
    named = {"tls_cert": pair[0], "tls_key": pair[1]}
    return named if client_ca is None else named | {"client_ca": client_ca}


# ---------------------------------------------------------------------------------------------------- why not


def test_what_is_said_of_an_engine_that_is_not_trusted(authority: Authority, tmp_path: Path, serve: Serve) -> None:
    good = authority.issue("engine", ["127.0.0.1", "engines.internal"])
    endpoint = Endpoint(serve(**files(good)))
    assert why_refused(endpoint, access(authority)) is None
    assert why_refused(Endpoint(endpoint.address, "engines.internal"), access(authority)) is None
    wrong_name = why_refused(Endpoint(endpoint.address, "other.internal"), access(authority))
    assert wrong_name is not None
    assert "for another name" in wrong_name
    assert "other.internal" in wrong_name
    stranger = Authority(tmp_path, "stranger")
    assert "engine_ca" in (why_refused(endpoint, access(stranger)) or "")
    expired = Endpoint(serve(**files(authority.issue("old-engine", ["127.0.0.1"], days=-1))))
    reason = why_refused(expired, access(authority))
    assert reason is not None
    assert "expired" in reason
    assert "renew" in reason
    assert "does not speak TLS" in (why_refused(Endpoint(serve()), access(authority)) or "")


def test_what_is_said_of_a_client_that_is_not_trusted(authority: Authority, tmp_path: Path, serve: Serve) -> None:
    pair = authority.issue("engine", ["127.0.0.1"])
    endpoint = Endpoint(serve(**files(pair, authority.file)))
    assert why_refused(endpoint, access(authority, authority.issue("shim"))) is None
    assert "engine_cert and engine_key" in (why_refused(endpoint, access(authority)) or "")
    stranger = Authority(tmp_path, "stranger")
    for name, client in (
        ("expired", authority.issue("old-shim", days=-1)),
        ("unknown", stranger.issue("strange-shim")),
    ):
        reason = why_refused(endpoint, access(authority, client))
        assert reason is not None, name
        assert "engine_cert" in reason


def test_nobody_there_is_no_matter_of_certificates(authority: Authority) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = Endpoint(f"127.0.0.1:{taken.getsockname()[1]}")
        assert why_refused(endpoint, access(authority)) is None


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("shim")
    other, _ = authority.issue("other")
    EngineAccess(authority.file, cert, key).check()
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for broken, words in (
        (EngineAccess(nothing), "holds no certificate"),
        (EngineAccess(tmp_path / "nowhere"), "engine_ca .*nowhere can't be read"),
        (EngineAccess(authority.file, other, key), "are not a certificate and its key"),
        (EngineAccess(authority.file, cert, tmp_path / "nowhere"), "engine_key .*can't be read"),
        (EngineAccess(token_file=tmp_path / "nowhere"), "engine_token_file .*can't be read"),
    ):
        with pytest.raises(AccessError, match=words):
            broken.check()


@pytest.mark.parametrize(
    ("address", "configured", "encrypted"),
    [
        ("unix:/run/engine.sock", True, False),
        ("127.0.0.1:50051", False, False),
        ("127.0.0.1:50051", True, True),
        ("[::1]:50051", False, False),
        ("10.0.0.7:50051", False, True),
        ("engine.internal:50051", False, True),
    ],
)
def test_which_connections_are_encrypted(authority: Authority, address: str, configured: bool, encrypted: bool) -> None:
    found = access(authority) if configured else EngineAccess()
    assert found.encrypts(Endpoint(address)) is encrypted


def test_targets_are_addresses_and_names() -> None:
    fixed, names = split_targets(("unix:/e.sock", "dns:///engines.internal:50051", "10.0.0.7:50051"))
    assert [endpoint.address for endpoint in fixed] == ["unix:/e.sock", "10.0.0.7:50051"]
    assert names == ["engines.internal:50051"]


# ---------------------------------------------------------------------------------------------------- whole


def test_a_shim_and_an_engine_that_know_each_other(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By name, with certificates of both sides; then the shim's runs out, is told of in words, and is renewed."""
    engine_cert, engine_key = authority.issue("engine", ["engines.internal"])
    client_cert, client_key = authority.issue("shim", days=-1)
    credentials = grpc.ssl_server_credentials(
        [(engine_key.read_bytes(), engine_cert.read_bytes())], authority.file.read_bytes(), True
    )
    port = free_port()
    engine = ScriptedEngine(f"127.0.0.1:{port}", credentials=credentials)
    engine.start()

    async def lookup(host: str, _port: int) -> list[str]:
        assert host == "engines.internal"
        return ["127.0.0.1"]

    shim = ShimServer(
        tmp_path / "state",
        (f"dns:///engines.internal:{port}",),
        access=EngineAccess(authority.file, client_cert, client_key),
        lookup=lookup,
    )
    shim.start()
    body = {"model": HAIKU, "messages": [{"role": "user", "content": "COUNT 3"}]}
    try:
        until(lambda: "engine_cert" in caplog.text, "the reason is told")
        with shim.client() as client:
            assert client.post("/v2/messages", json=body).status_code == 503
            authority.issue("shim")
            shim.wait_ready()
            assert client.post("/v2/messages", json=body).status_code == 200
    finally:
        shim.stop()
        engine.close()
    assert sum("engine_cert" in record.getMessage() for record in caplog.records) == 1  # not once a try


def test_a_wrong_token_is_said(serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token, wrong = tmp_path / "token", tmp_path / "wrong"
    token.write_text(TOKEN)
    wrong.write_text("another")
    address = serve(token_file=token)
    shim = ShimServer(tmp_path / "state", (address,), access=EngineAccess(token_file=wrong))
    shim.start()
    try:
        until(lambda: "does not take our token" in caplog.text, "the reason is told")
    finally:
        shim.stop()
    assert TOKEN not in caplog.text
    assert "another" not in caplog.text
