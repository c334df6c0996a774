"""Which credential a request carries. Reads headers; knows no store."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass

from aiexport_edge.shim.errors import Unauthenticated

_CHALLENGE = ((b"www-authenticate", b"Bearer"),)
_INVALID_TOKEN = ((b"www-authenticate", b'Bearer error="invalid_token"'),)  # RFC 6750, 3.1: a client gets a new one


@dataclass(frozen=True, slots=True)
class Presented:
    """What came in a header. `bearer` is False for `X-API-Key`, which takes keys alone."""

    text: str
    bearer: bool


def unauthenticated(message: str) -> Unauthenticated:
    """A 401 with the challenge that RFC 9110 wants."""
    return Unauthenticated(message, headers=_CHALLENGE)


def invalid(presented: Presented) -> Unauthenticated:
    """The 401 for a credential that is not good. One message for all reasons: which it was is nobody's business."""
    if presented.bearer and not presented.text.startswith("axp_"):
        message = "The access token is not valid: it is altered, expired or revoked. Get a new one."
        return Unauthenticated(message, headers=_INVALID_TOKEN)
    return unauthenticated("The API key is not valid: it is unknown, revoked or expired.")


def presented(headers: Iterable[tuple[bytes, bytes]]) -> Presented:
    """What is in `X-API-Key`, or else in `Authorization: Bearer`; with both, `X-API-Key` counts.

    Raises `Unauthenticated` where there is neither.
    """
    api_key = authorization = None
    for name, value in headers:
        if name == b"x-api-key":
            api_key = value
        elif name == b"authorization":
            authorization = value
    if api_key is not None:
        return Presented(api_key.decode("latin-1").strip(), bearer=False)
    if authorization is None:
        raise unauthenticated('No API key given. Send it as "X-API-Key: axp_live_…".')
    scheme, _, credential = authorization.decode("latin-1").strip().partition(" ")
    if scheme.lower() != "bearer" or not credential.strip():
        raise unauthenticated(
            'Only "Authorization: Bearer …" with an API key or an access token is understood, or "X-API-Key".'
        )
    return Presented(credential.strip(), bearer=True)


def basic(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, str] | None:
    """Name and password of `Authorization: Basic` (RFC 7617); None where there is no such header.

    Raises `ValueError` for an `Authorization` that is not that.
    """
    values = [value for name, value in headers if name == b"authorization"]
    if not values:
        return None
    scheme, _, encoded = values[-1].strip().partition(b" ")
    if scheme.lower() != b"basic":
        raise ValueError("not Basic")
    try:
        name, colon, password = base64.b64decode(encoded.strip(), validate=True).decode("utf-8").partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError("not base64 of UTF-8") from None
    if not colon:
        raise ValueError("no colon")
    return name, password
