"""Clients of the engine's listener that must show a certificate, and certificates that are renewed while it serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.certificates import Authority
from support.engine_server import run

from aiexport_edge.engine.server.listener import Listener, ListenerConfig, ListenerError, open_listener
from aiexport_edge.proto.engine_pb2_grpc import EngineServicer


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def listening(config: ListenerConfig) -> AsyncIterator[Listener]:
    listener = await open_listener(config, EngineServicer())
    try:
        yield listener
    finally:
        await listener.close(0)


def credentials(ca: Path, pair: tuple[Path, Path] | None) -> grpc.ChannelCredentials:
    cert, key = (None, None) if pair is None else (pair[0].read_bytes(), pair[1].read_bytes())
    return grpc.ssl_channel_credentials(ca.read_bytes(), key, cert)


async def connects(port: int, ca: Path, pair: tuple[Path, Path] | None = None) -> bool:
    """Whether a call comes through."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials(ca, pair), options) as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        code = await call.code()
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
        return code is grpc.StatusCode.OK


def test_only_clients_of_the_authority(authority: Authority, tmp_path: Path) -> None:
    async def test() -> None:
        cert, key = authority.issue("engine", ["127.0.0.1"])
        stranger = Authority(tmp_path, "stranger")
        config = ListenerConfig("127.0.0.1:0", cert, key, client_ca=authority.file)
        async with listening(config) as listener:
            ca = authority.file
            assert await connects(listener.port, ca, authority.issue("shim"))
            assert not await connects(listener.port, ca)
            assert not await connects(listener.port, ca, stranger.issue("shim-of-another"))
            assert not await connects(listener.port, ca, authority.issue("old-shim", days=-1))
            assert not await connects(listener.port, stranger.file, authority.issue("shim"))

    run(test())


def test_renewed_files_count_from_the_next_connection(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        cert, key = authority.issue("engine", ["127.0.0.1"], days=-1)
        async with listening(ListenerConfig("127.0.0.1:0", cert, key)) as listener:
            assert not await connects(listener.port, authority.file)
            authority.issue("engine", ["127.0.0.1"])
            assert await connects(listener.port, authority.file)
            other, _ = authority.issue("other", ["127.0.0.1"])
            right = cert.read_bytes()
            cert.write_bytes(other.read_bytes())  # does not fit the key
            assert await connects(listener.port, authority.file)
            assert "the old certificate stays in use" in caplog.text
            cert.write_bytes(right)
            assert await connects(listener.port, authority.file)

    run(test())


def test_what_is_no_authority_is_said(authority: Authority, tmp_path: Path) -> None:
    async def test() -> None:
        cert, key = authority.issue("engine", ["127.0.0.1"])
        for content in (b"nothing", b"\xff\xfe"):
            (tmp_path / "none.pem").write_bytes(content)
            config = ListenerConfig("127.0.0.1:0", cert, key, client_ca=tmp_path / "none.pem")
            with pytest.raises(ListenerError, match=r"client_ca .*none.pem holds no certificate"):
                await open_listener(config, EngineServicer())
        with pytest.raises(ListenerError, match=r"client_ca .*nowhere cannot be read"):
            await open_listener(
                ListenerConfig("127.0.0.1:0", cert, key, client_ca=tmp_path / "nowhere"), EngineServicer()
            )

    run(test())


def test_a_unix_socket_is_not_encrypted(authority: Authority, tmp_path: Path) -> None:
    """`serve` and an engine of its own read the same [engine]: its certificate is for those who come from elsewhere."""

    async def test() -> None:
        cert, key = authority.issue("engine", ["127.0.0.1"])
        config = ListenerConfig(f"unix:{tmp_path / 'e.sock'}", cert, key, client_ca=authority.file)
        async with listening(config), grpc.aio.insecure_channel(config.address) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    run(test())
