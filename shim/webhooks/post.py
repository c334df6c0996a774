"""One POST to an address that a client has named: to that very address, once, within a time, reading a head at most.

How it connects is `outgoing.py`'s. No redirect is followed, and of the reply nothing is kept but its status.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence

from aiexport_edge.shim.address_policy import AddressPolicy, Target
from aiexport_edge.shim.outgoing import NotReached, connected

_MAX_HEAD_BYTES = 32 << 10
_READ_BYTES = 4 << 10


class NotDelivered(Exception):
    """Why a POST came to nothing, as the operator is told. `status` where there was a reply."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


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
    except NotReached as error:
        raise NotDelivered(str(error)) from None
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
    async with connected(target, policy, tls) as (reader, writer):  # of a reply only the head is wanted
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
