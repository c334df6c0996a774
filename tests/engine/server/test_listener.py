"""Who may connect: beyond this machine only over TLS and with the token."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.engine_server import chat, run

from aiexport_edge.engine.server.listener import Listener, ListenerConfig, ListenerError, open_listener
from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineServicer, EngineStub

TOKEN = "s3cret-token"


class Servicer(EngineServicer):
    """Answers one call; what a call does is another test's matter."""

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.ModelInfo(name="m0")])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A certificate for 127.0.0.1, its key, and a token."""
    root = tmp_path_factory.mktemp("tls")
    files = {"tls_cert": root / "cert.pem", "tls_key": root / "key.pem", "token_file": root / "token"}
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    make += ["-keyout", str(files["tls_key"]), "-out", str(files["tls_cert"])]
    try:
        subprocess.run(make, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed: no certificate to test with")
    files["token_file"].write_text(TOKEN + "\n")
    return files


@asynccontextmanager
async def listening(config: ListenerConfig) -> AsyncIterator[Listener]:
    listener = await open_listener(config, Servicer())
    try:
        yield listener
    finally:
        await listener.close(0)


async def names(channel: grpc.aio.Channel, *metadata: tuple[str, str]) -> list[str]:
    response = await EngineStub(channel).ListModels(pb.ListModelsRequest(), metadata=metadata or None)
    return [model.name for model in response.models]


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:50051", "engine.example:50051"])
@pytest.mark.parametrize("given", [[], ["tls_cert", "tls_key"], ["token_file"]])
def test_beyond_loopback_it_refuses_to_start_without_both(
    files: dict[str, Path], address: str, given: list[str]
) -> None:
    async def test() -> None:
        with pytest.raises(ListenerError) as raised:
            await open_listener(ListenerConfig(address, **{name: files[name] for name in given}), Servicer())
        sentence = str(raised.value)
        assert address in sentence
        assert ("tls_cert" in sentence) == ("tls_cert" not in given)
        assert ("token_file" in sentence) == ("token_file" not in given)

    run(test())


def test_an_empty_token_is_none(files: dict[str, Path], tmp_path: Path) -> None:
    async def test() -> None:
        empty = tmp_path / "token"
        empty.write_text(" \n")
        with pytest.raises(ListenerError, match="token_file"):
            await open_listener(ListenerConfig("0.0.0.0:0", **files | {"token_file": empty}), Servicer())

    run(test())


def test_beyond_loopback_with_both(files: dict[str, Path]) -> None:
    async def test() -> None:
        async with listening(ListenerConfig("0.0.0.0:0", **files)) as listener:
            address = f"127.0.0.1:{listener.port}"
            credentials = grpc.ssl_channel_credentials(files["tls_cert"].read_bytes())
            async with grpc.aio.secure_channel(address, credentials) as channel:
                assert await names(channel, ("authorization", f"Bearer {TOKEN}")) == ["m0"]
                for metadata in ([], [("authorization", "Bearer wrong")], [("authorization", TOKEN)]):
                    with pytest.raises(grpc.aio.AioRpcError) as raised:
                        await names(channel, *metadata)
                    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
                # Streams, and the services beside ours, alike.
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    async for _ in EngineStub(channel).Generate(chat("a")):
                        pass
                assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
                call: Any = EngineStub(channel).Session()
                assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
                # No reflection here, for anyone.
                reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")]),
                    metadata=[("authorization", f"Bearer {TOKEN}")],
                )
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    async for _ in reflection:
                        pass
                assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
            # In the clear it does not speak at all.
            async with grpc.aio.insecure_channel(address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await names(channel, ("authorization", f"Bearer {TOKEN}"))
                assert raised.value.code() is grpc.StatusCode.UNAVAILABLE

    run(test())


def test_a_token_on_loopback_is_asked_for_too(files: dict[str, Path]) -> None:
    async def test() -> None:
        async with (
            listening(ListenerConfig("127.0.0.1:0", token_file=files["token_file"])) as listener,
            grpc.aio.insecure_channel(f"127.0.0.1:{listener.port}") as channel,
        ):
            assert await names(channel, ("authorization", f"Bearer {TOKEN}")) == ["m0"]
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await names(channel)
            assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED

    run(test())


def test_a_unix_socket_is_local(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "engine.sock"
        for _ in range(2):  # what an earlier process has left there is no obstacle
            async with (
                listening(ListenerConfig(f"unix:{path}")),
                grpc.aio.insecure_channel(f"unix:{path}") as channel,
            ):
                assert await names(channel) == ["m0"]
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(path))

    run(test())


def test_what_cannot_be_opened_is_said(files: dict[str, Path], tmp_path: Path) -> None:
    async def test() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(ListenerError, match="another process"):
                await open_listener(ListenerConfig(f"127.0.0.1:{taken.getsockname()[1]}"), Servicer())
        missing = files | {"tls_key": tmp_path / "nowhere"}
        with pytest.raises(ListenerError, match=r"tls_key .*nowhere cannot be read"):
            await open_listener(ListenerConfig("0.0.0.0:0", **missing), Servicer())
        broken = tmp_path / "broken.pem"
        broken.write_text("no certificate")
        with pytest.raises(ListenerError, match="not a certificate and its key"):
            await open_listener(ListenerConfig("0.0.0.0:0", **files | {"tls_cert": broken}), Servicer())

    run(test())


def test_the_certificate_is_the_one_configured(files: dict[str, Path]) -> None:
    async def test() -> None:
        async with listening(ListenerConfig("127.0.0.1:0", **files)) as listener:
            pem = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", listener.port), timeout=60)
            assert pem.strip() == files["tls_cert"].read_text().strip()

    run(test())
