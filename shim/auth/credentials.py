"""Which credential a request carries. Reads headers; knows no store."""

from __future__ import annotations

from collections.abc import Iterable

from aiexport_edge.shim.errors import Unauthenticated

_CHALLENGE = ((b"www-authenticate", b"Bearer"),)


def unauthenticated(message: str) -> Unauthenticated:
    """A 401 with the challenge that RFC 9110 wants."""
    return Unauthenticated(message, headers=_CHALLENGE)


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The API key of `X-API-Key`, or else of `Authorization: Bearer`; with both, `X-API-Key` counts.

    Raises `Unauthenticated` where there is neither.
    """
    api_key = authorization = None
    for name, value in headers:
        if name == b"x-api-key":
            api_key = value
        elif name == b"authorization":
            authorization = value
    if api_key is not None:
        return api_key.decode("latin-1").strip()
    if authorization is None:
        raise unauthenticated('No API key given. Send it as "X-API-Key: axp_live_…".')
    scheme, _, credential = authorization.decode("latin-1").strip().partition(" ")
    if scheme.lower() != "bearer":
        raise unauthenticated('Only "Authorization: Bearer …" with an API key is understood, or "X-API-Key".')
    return credential.strip()
