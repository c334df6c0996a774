"""The gRPC server around the service: where it listens, who may connect, and the standard services beside it.

Owns the rule that a listener beyond this machine needs TLS and a token, or refuses to start.
"""

from __future__ import annotations

import hmac
import logging
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import add_EngineServicer_to_server
from aiexport_edge.proto.units import is_loopback

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 33 << 20  # a REST body of 32 MiB, and what stands around it
SERVICE_NAME = pb.DESCRIPTOR.services_by_name["Engine"].full_name
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    # A client that has gone without a word (its machine lost power) is noticed within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class ListenerError(Exception):
    """The listener cannot be opened; a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class ListenerConfig:
    """`address` is HOST:PORT or unix:PATH; the files are None where not configured. With `client_ca`, clients must show
    a certificate that it has issued. A unix socket is never encrypted: nothing but this machine can reach it.
    """

    address: str
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    client_ca: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        host = self.address.rpartition(":")[0].removeprefix("[").removesuffix("]")
        return self.address.startswith("unix:") or is_loopback(host)


class Listener:
    """An open gRPC server. `port` is the bound one (0 for unix sockets)."""

    def __init__(self, server: grpc.aio.Server, health_servicer: HealthServicer, port: int) -> None:
        self.port = port
        self._server = server
        self._health = health_servicer

    async def set_serving(self, serving: bool) -> None:
        """What the standard health service says, of the server and of the engine service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def close(self, grace_s: float) -> None:
        """No new calls; those that run may end within `grace_s`, then they are cancelled."""
        await self._server.stop(grace_s)


async def open_listener(config: ListenerConfig, servicer: Any) -> Listener:
    """Binds and starts. Raises `ListenerError`."""
    token = _read(config.token_file, "token_file").decode("utf-8", "strict").strip() if config.token_file else ""
    if not config.is_local:
        missing = [
            name
            for name, there in (("tls_cert and tls_key", config.tls_cert and config.tls_key), ("token_file", token))
            if not there
        ]
        if missing:
            raise ListenerError(
                f"the engine does not listen on {config.address}, which other machines can reach, without TLS and a "
                f"token: set {' and '.join(missing)} in [engine], or listen on 127.0.0.1 or a unix socket"
            )
    interceptors = [_TokenInterceptor(token)] if token else []
    server = grpc.aio.server(options=_OPTIONS, interceptors=interceptors)
    add_EngineServicer_to_server(servicer, server)
    health_servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    if config.is_local:
        from grpc_reflection.v1alpha import reflection

        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    try:
        if config.tls_cert and config.tls_key and not config.address.startswith("unix:"):
            port = server.add_secure_port(config.address, _Certificate(config).credentials())
        else:
            port = server.add_insecure_port(config.address)
    except RuntimeError as error:
        raise ListenerError(f"the engine cannot listen on {config.address}; is another process there?") from error
    listener = Listener(server, health_servicer, port)
    await listener.set_serving(False)
    await server.start()
    return listener


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ListenerError(f"{name} {path} cannot be read ({error.strerror})") from error


class _Certificate:
    """The listener's certificate and whose clients it takes. Renewed files count from the next connection on; some that
    can't be used are told of, and the old ones stay.
    """

    def __init__(self, config: ListenerConfig) -> None:
        assert config.tls_cert is not None
        assert config.tls_key is not None
        self._cert, self._key, self._client_ca = config.tls_cert, config.tls_key, config.client_ca
        self._versions = self._look()
        self._first = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._renewed,  # type: ignore[arg-type]  # the stubs do not know that None is an answer
            require_client_authentication=self._client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC, in a thread of its own, before each handshake. None: as before."""
        found = self._look()
        if found == self._versions:
            return None
        self._versions = found
        try:
            renewed = self._load()
        except ListenerError as error:
            log.error("the old certificate stays in use: %s", error)
            return None
        log.info("the certificate has been renewed")
        return renewed

    def _load(self) -> grpc.ServerCertificateConfiguration:
        """Raises `ListenerError`."""
        pair = (_read(self._key, "tls_key"), _read(self._cert, "tls_cert"))
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key, password=_no_password)
        except ssl.SSLError as error:
            raise ListenerError(
                f"{self._cert} and {self._key} (tls_cert, tls_key) are not a certificate and its key"
            ) from error
        authorities = None
        if self._client_ca is not None:
            authorities = _read(self._client_ca, "client_ca")
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=authorities.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise ListenerError(f"client_ca {self._client_ca} holds no certificate in PEM") from error
        return grpc.ssl_server_certificate_configuration([pair], authorities)

    def _look(self) -> list[tuple[int, int]]:
        """What changes when a file does; (0, 0) for one that is not there just now."""
        return [_version(file) for file in (self._cert, self._key, self._client_ca) if file is not None]


def _version(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_ino


def _no_password() -> str:
    raise ListenerError("tls_key is encrypted; store it without a password, readable by this user alone")


class _TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not subscriptable when it runs
    """Refuses calls without `authorization: Bearer TOKEN`."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        metadata = dict(handler_call_details.invocation_metadata or ())
        given = metadata.get("authorization", "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            return await continuation(handler_call_details)
        handler = await continuation(handler_call_details)
        return _refusing(handler)


async def _unauthenticated(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "This engine asks for its token: authorization: Bearer TOKEN.")


def _refusing(handler: Any) -> Any:
    """A handler of the same shape as `handler` that refuses."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(_unauthenticated)
