"""A REST client for the commands that call a server: one request at a time, read as it arrives, with a deadline.

Owns base URLs, TLS, deadlines, size limits and the reading of server-sent events (the HTML standard, section 9.2.6).
Follows no redirect and uses no proxy of the environment. Knows no path of the API; none of its errors holds a key.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from aiexport_edge.proto.config import Config
from aiexport_edge.proto.units import join_address, split_address
from aiexport_edge.shim.cli.command import CommandError
from aiexport_edge.shim.cli.serve_lock import serving
from aiexport_edge.shim.cli.welcome import own_tls

KEY_VARIABLE = "AIEXPORT_KEY"
KEY = re.compile(r"[!-~]{1,4096}")
CHUNK = 1 << 16
MAX_REPLY = 256 << 20  # bytes; a longer reply is cut off with an error


class Unreachable(Exception):
    """There is no connection to be had. The text says why and what to do."""


class NoReply(Exception):
    """A connection, but no whole reply. The text reads on after "the server"."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where to send: what a base URL says, without a `/v2` at its end, which every path brings along."""

    host: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None

    @property
    def url(self) -> str:
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{join_address(self.host, self.port)}{self.prefix}"


@dataclass(slots=True)
class Exchange:
    """A reply whose head has arrived. `chunks` yields the rest as it comes."""

    status: int
    headers: tuple[tuple[str, str], ...]  # names in lower case
    _response: http.client.HTTPResponse
    _socket: socket.socket
    _deadline: float

    def header(self, name: str) -> str:
        """The first one's value, or an empty text."""
        return next((value for key, value in self.headers if key == name), "")

    def chunks(self) -> Iterator[bytes]:
        """Raises `NoReply` where the rest does not come whole, or not in time."""
        total = 0
        while True:
            with _no_reply(self._deadline):
                self._socket.settimeout(_left(self._deadline))
                chunk = self._response.read1(CHUNK)
            if not chunk:
                # read1 takes an early end for the end where a length was given
                if self._response.length:
                    raise NoReply("broke off in the middle of its reply")
                return
            total += len(chunk)
            if total > MAX_REPLY:
                raise NoReply(f"sent more than {MAX_REPLY >> 20} MiB")
            yield chunk

    def body(self) -> bytes:
        return b"".join(self.chunks())


def parse_server(url: str) -> Server:
    """Raises `ValueError` with a phrase that reads on after the option's name."""
    example = 'must be a base URL such as "https://api.example.com"'
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"{example}; this one cannot be read") from None
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{example}, without a name and password in it")  # never repeated: it holds a secret
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{example}, not {url!r}")
    if not re.fullmatch(r"[!-~]*", url):
        raise ValueError(f"{example}, without blanks and control characters")
    prefix = parts.path.rstrip("/").removesuffix("/v2")
    secure = parts.scheme == "https"
    tls = ssl.create_default_context() if secure else None
    return Server(parts.hostname, port or (443 if secure else 80), prefix, tls)


def own_server(config: Config) -> Server:
    """This installation's REST listener, called from this machine: of the `serve` that runs, else as configured."""
    found = serving(config.state)
    if found is not None and found.rest is not None:
        host, port = split_address(found.rest)
    else:
        host, port = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.shim.host, config.shim.host), config.shim.port
    return Server(host, port, "", None if config.tls.cert is None else own_tls())


def checked_key(key: str, option: str) -> str:
    """`key` where a header can carry it. Raises `CommandError` without repeating it."""
    if not KEY.fullmatch(key):
        raise CommandError(f"what {option} names is no API key: it is empty or holds blanks; pass the key alone")
    return key


def key_from_environment() -> str | None:
    return os.environ.get(KEY_VARIABLE) or None


@contextmanager
def exchange(
    server: Server,
    path: str,
    *,
    body: Any = None,
    key: str | None = None,
    timeout: float,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Exchange]:
    """Sends one request, a POST where there is a JSON `body`, else a GET.

    `timeout` is for all of it, in seconds. Raises `Unreachable`, `NoReply`.
    """
    deadline = time.monotonic() + timeout
    fields = {"Accept": "*/*", **(headers or {})}
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        fields["Content-Type"] = "application/json"
    if key is not None:
        fields["X-API-Key"] = key
    connection = _connected(server, timeout)
    try:
        sock = connection.sock
        with _no_reply(deadline):
            connection.request("GET" if data is None else "POST", server.prefix + path, data, fields)
            sock.settimeout(_left(deadline))
            response = connection.getresponse()
        names = tuple((name.lower(), value) for name, value in response.getheaders())
        yield Exchange(response.status, names, response, sock, deadline)
    finally:
        connection.close()


def _connected(server: Server, timeout: float) -> http.client.HTTPConnection:
    if server.tls is None:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=timeout)
    else:
        connection = http.client.HTTPSConnection(server.host, server.port, timeout=timeout, context=server.tls)
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        reason = f"its certificate is not trusted ({error.verify_message}); name the file of its CA in SSL_CERT_FILE"
        raise Unreachable(f"{server.url}: {reason}") from None
    except TimeoutError:
        raise Unreachable(f"{server.url} does not answer; is its address right?") from None
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such host"
        raise Unreachable(f"{server.url} cannot be reached ({reason}); start it, or correct the address") from None
    return connection


@contextmanager
def _no_reply(deadline: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise NoReply("was not done in time") from None
    except http.client.HTTPException as error:
        raise NoReply(f"sent no valid HTTP ({type(error).__name__})") from None
    except OSError as error:
        raise NoReply(f"closed the connection ({error.strerror or type(error).__name__})") from None


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def events(chunks: Iterable[bytes]) -> Iterator[tuple[str, str]]:
    """The server-sent events of a body: each one's name ("message" where it has none) and its data."""
    name = ""
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield name or "message", "\n".join(data)
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            name = value
        elif field == "data":
            data.append(value)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")
