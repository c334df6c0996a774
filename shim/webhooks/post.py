"""One POST to an address that a client has named: to that very address, once, within a time, reading a head at most.

The name is resolved here, each address is asked about, and the connection is made to one that is allowed: there is no
second lookup that could answer otherwise. TLS is verified by the name. No redirect is followed, no proxy is used, and
of the reply nothing is kept but its status.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from aiexport_edge.shim.address_policy import Address, AddressPolicy, Target

_MAX_HEAD_BYTES = 32 << 10
_READ_BYTES = 4 << 10


class NotDelivered(Exception):
    """Why a POST came to nothing, as the operator is told. `status` where there was a reply."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def tls_context(ca: Path | None) -> ssl.SSLContext:
    """The system's authorities, and those of the PEM file `ca`. Takes some 20 ms."""
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is not None:
        context.load_verify_locations(ca)
    return context


async def post(
    target: Target,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    *,
    policy: AddressPolicy,
    tls: ssl.SSLContext | None,
    seconds: float,
) -> int:
    """The status of a 2xx reply. Raises `NotDelivered` for everything else. `tls` is for https targets."""
    import h11  # not before the first webhook is sent

    try:
        async with asyncio.timeout(seconds):
            status = await _exchange(target, headers, body, policy, tls)
    except TimeoutError:
        raise NotDelivered(f"no reply within {seconds:.0f} s") from None
    except ssl.SSLCertVerificationError as error:
        raise NotDelivered(f"the certificate is not valid: {error.verify_message}") from None
    except (ssl.SSLError, h11.ProtocolError, EOFError):
        raise NotDelivered("the reply is not that of an HTTP server") from None
    except OSError as error:
        raise NotDelivered(f"no connection: {error.strerror or type(error).__name__}") from None
    if not 200 <= status < 300:
        raise NotDelivered(f"answered {status}", status)
    return status


async def _exchange(
    target: Target,
    headers: Sequence[tuple[str, str]],
    body: bytes,
    policy: AddressPolicy,
    tls: ssl.SSLContext | None,
) -> int:
    import h11

    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
    request = h11.Request(
        method="POST",
        target=target.path,
        headers=[
            ("host", target.authority),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
            *headers,
        ],
    )
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
        for part in (request, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(connection.send(part) or b"")
        await writer.drain()
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                return int(event.status_code)
            if event is h11.NEED_DATA:
                data = await reader.read(_READ_BYTES)
                if not data:
                    raise EOFError
                connection.receive_data(data)
    finally:
        writer.transport.abort()  # the rest of the reply, however long, is not wanted


async def _connect(target: Target, policy: AddressPolicy) -> socket.socket:
    """A connection to the first address that is allowed and answers."""
    loop = asyncio.get_running_loop()
    allowed = [
        (family, place) for family, address, place in await _addresses(target) if policy.allows(target.host, address)
    ]
    if not allowed:
        raise NotDelivered("the address is not one that [webhooks] allow names")
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
            raise NotDelivered(f"the host name does not resolve: {error.strerror}") from None
        found = list(dict.fromkeys(ipaddress.ip_address(info[4][0]) for info in infos))
    return [
        (socket.AF_INET if address.version == 4 else socket.AF_INET6, address, (str(address), target.port))
        for address in found
    ]
