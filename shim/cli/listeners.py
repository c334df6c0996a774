"""The listening sockets of an installation.

Owns how they are opened, and the sentence for a port that cannot be had. The process that calls this keeps them for as
long as it serves and lends them to its workers by number, so that one can be replaced and no connection is refused.
Also where the engine's own socket lies.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiexport_edge.proto.units import join_address
from aiexport_edge.shim.cli.command import CommandError

ENGINE_SOCKET = "engine.sock"  # in the state directory
SOCKET_PATH_LIMIT = 100  # bytes; sun_path of unix(7) holds 108 with its end
BACKLOG = 2048  # connections that wait while workers are replaced; the kernel caps it at net.core.somaxconn


def listen(host: str, port: int, option: str) -> socket.socket:
    """A listening TCP socket. Raises `CommandError` naming `option` as the remedy."""
    where = join_address(host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        raise CommandError(f"{host} is no address of this machine; correct it, or use 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise CommandError(_sentence(error, where, port, option)) from None
    return sock


def _sentence(error: OSError, where: str, port: int, option: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{where} is taken by another program; stop it, or choose another port with {option}"
    if error.errno == errno.EACCES:
        return f"this user may not listen on port {port}; choose one above 1023 with {option}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{where} is no address of this machine; correct it, or use 127.0.0.1"
    return f"cannot listen on {where} ({error.strerror}); choose another port with {option}"


def reachable_host(sock: socket.socket) -> str:
    """A host name under which this machine itself reaches the listener."""
    host = str(sock.getsockname()[0])
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


@contextmanager
def engine_socket(state: Path) -> Iterator[Path]:
    """Where the engine is to listen: in the state directory, or in a new one where that path is too long for a socket.
    Then a link in the state directory says where.
    """
    path = state / ENGINE_SOCKET
    if path.is_symlink():  # of a serve that was killed
        path.unlink()
    if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="aiexport-edge-") as short:
        path.unlink(missing_ok=True)  # of an engine that was reached by another spelling of the path
        path.symlink_to(Path(short) / ENGINE_SOCKET)
        try:
            yield Path(short) / ENGINE_SOCKET
        finally:
            path.unlink(missing_ok=True)


def find_engine_socket(state: Path) -> Path | None:
    """Where the engine listens that `serve` has started on this state directory."""
    path = state / ENGINE_SOCKET
    if path.is_symlink():
        path = path.readlink()
    if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
        path = path.resolve()  # `serve` was given a shorter way here, or the link would say another
    return path if path.exists() else None
