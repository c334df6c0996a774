"""Connections to addresses that a client has named: to one that the operator's list allows, and to no other.

The name is resolved here, each address is asked about, and the connection is made to one that is allowed: there is no
second lookup that could answer otherwise. TLS is verified by the name. No proxy is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiexport_edge.shim.address_policy import Address, AddressPolicy, Target


class NotReached(Exception):
    """There is no connection to be had; a phrase."""


def tls_context(ca: Path | None) -> ssl.SSLContext:
    """The system's authorities, and those of the PEM file `ca`. Takes some 20 ms."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is not None:
        context.load_verify_locations(ca)
    return context


@asynccontextmanager
async def connected(
    target: Target, policy: AddressPolicy, tls: ssl.SSLContext | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open for so long; at the end it is aborted, whatever was still to come. `tls` is for https targets.

    Raises `NotReached`, and OSError (`ssl.SSLError` is one).
    """
    sock = await _connect(target, policy)
    try:
        secure = tls if target.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            sock=sock, ssl=secure, server_hostname=target.host if secure else None
        )
    except BaseException:
        sock.close()
        raise
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def _connect(target: Target, policy: AddressPolicy) -> socket.socket:
    """A connection to the first address that is allowed and answers."""
    loop = asyncio.get_running_loop()
    allowed = [
        (family, place) for family, address, place in await _addresses(target) if policy.allows(target.host, address)
    ]
    if not allowed:
        raise NotReached("the address is not one that the operator allows")
    problem: OSError | None = None
    for family, place in allowed:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, place)
        except OSError as error:
            sock.close()
            problem = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    assert problem is not None
    raise problem


async def _addresses(target: Target) -> list[tuple[socket.AddressFamily, Address, tuple[str, int]]]:
    """Every address of the target, in the system's order, and what to connect to for it: always in numbers."""
    if target.address is not None:
        found: list[Address] = [target.address]
    else:
        loop = asyncio.get_running_loop()
        try:
            infos = await loop.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise NotReached(f"the host name does not resolve: {error.strerror}") from None
        found = list(dict.fromkeys(ipaddress.ip_address(info[4][0]) for info in infos))
    return [
        (socket.AF_INET if address.version == 4 else socket.AF_INET6, address, (str(address), target.port))
        for address in found
    ]
