"""The listening sockets of an installation.

Owns how they are opened, and the sentence for a port that cannot be had. The process that calls this keeps them for as
long as it serves and lends them to its workers by number, so that one can be replaced and no connection is refused.
"""

from __future__ import annotations

import errno
import socket

from aiexport_edge.proto.units import join_address
from aiexport_edge.shim.cli.command import CommandError

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
