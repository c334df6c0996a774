"""What an engine beyond this machine wants of a client: TLS, perhaps a certificate of the client's own, and a token.

Owns the rule which connections are encrypted: a unix socket never is; loopback is where certificates are configured;
everything else always. The files are read anew for each connection, so that renewed ones count from the next on.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from aiexport_edge.proto.config_values import DNS
from aiexport_edge.proto.units import is_loopback, split_address

MAX_MESSAGE_BYTES = 33 << 20  # as the engine has it; a larger one would end the session
_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # else a new channel inherits the backoff of the last one
    ("grpc.enable_http_proxy", 0),
)


class AccessError(Exception):
    """A certificate, key or token can't be used: a sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address of an engine, HOST:PORT or unix:PATH; `server_name`: what its certificate is for, where not that."""

    address: str
    server_name: str | None = None

    @property
    def is_unix(self) -> bool:
        return self.address.startswith("unix:")

    @property
    def host(self) -> str:
        """What the certificate is checked for. Not of a unix socket."""
        return self.server_name or split_address(self.address)[0]


@dataclass(frozen=True, slots=True)
class EngineAccess:
    """The files of `[shim]`, all PEM but the token. `ca` None: the authorities that gRPC knows."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    token_file: Path | None = None

    def encrypts(self, endpoint: Endpoint) -> bool:
        """Whether a connection to `endpoint` is over TLS."""
        if endpoint.is_unix:
            return False
        return bool(self.ca or self.cert) or not is_loopback(split_address(endpoint.address)[0])

    def check(self) -> None:
        """Raises `AccessError` where a file can't be read, or certificate and key do not fit."""
        self.token()
        self.context()

    def token(self) -> str | None:
        """Raises `AccessError`."""
        if self.token_file is None:
            return None
        return _read(self.token_file, "engine_token_file").decode("utf-8", "replace").strip()

    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """What goes with every call. Raises `AccessError`."""
        token = self.token()
        return None if token is None else (("authorization", f"Bearer {token}"),)

    def context(self) -> ssl.SSLContext:
        """The same access for a TLS connection of Python's. Raises `AccessError`."""
        try:
            context = ssl.create_default_context(cadata=self._ca_text())
        except (ssl.SSLError, ValueError):
            raise AccessError(f"[shim] engine_ca {self.ca} holds no certificate in PEM") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        if self.cert is not None and self.key is not None:
            _read(self.cert, "engine_cert")
            _read(self.key, "engine_key")
            try:
                context.load_cert_chain(self.cert, self.key, password=_no_password)
            except ssl.SSLError as error:
                raise AccessError(
                    f"[shim] engine_cert {self.cert} and engine_key {self.key} are not a certificate and its key "
                    f"({error.reason or error})"
                ) from None
        return context

    def channel(self, endpoint: Endpoint) -> grpc.aio.Channel:
        """A connection of its own, opened when it is first used. Raises `AccessError`."""
        if not self.encrypts(endpoint):
            return grpc.aio.insecure_channel(endpoint.address, _OPTIONS)
        self.check()
        credentials = grpc.ssl_channel_credentials(
            None if self.ca is None else _read(self.ca, "engine_ca"),
            None if self.key is None else _read(self.key, "engine_key"),
            None if self.cert is None else _read(self.cert, "engine_cert"),
        )
        named = [("grpc.default_authority", endpoint.server_name)] if endpoint.server_name else []
        return grpc.aio.secure_channel(endpoint.address, credentials, [*_OPTIONS, *named])

    def _ca_text(self) -> str | None:
        return None if self.ca is None else _read(self.ca, "engine_ca").decode("ascii", "replace")


def split_targets(targets: tuple[str, ...]) -> tuple[list[Endpoint], list[str]]:
    """The addresses that are fixed, and the HOST:PORT of names that stand for several."""
    names = [target.removeprefix(DNS) for target in targets if target.startswith(DNS)]
    return [Endpoint(target) for target in targets if not target.startswith(DNS)], names


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise AccessError(f"[shim] {key} {path} can't be read ({error.strerror})") from None


def _no_password() -> str:
    raise AccessError("[shim] engine_key is encrypted; store it without a password, readable by this user alone")
