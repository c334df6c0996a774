"""Signatures as Standard Webhooks has them (https://github.com/standard-webhooks/standard-webhooks, version 1)."""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64decode, b64encode
from collections.abc import Sequence

PREFIX = "whsec_"


def signed_headers(message_id: str, timestamp: int, body: bytes, secrets: Sequence[str]) -> list[tuple[str, str]]:
    """The three headers of one try: `timestamp` in seconds since 1970, a signature for each secret."""
    return [
        ("webhook-id", message_id),
        ("webhook-timestamp", str(timestamp)),
        ("webhook-signature", " ".join(_signature(message_id, timestamp, body, secret) for secret in secrets)),
    ]


def _signature(message_id: str, timestamp: int, body: bytes, secret: str) -> str:
    signed = b"%s.%d.%s" % (message_id.encode("ascii"), timestamp, body)
    key = b64decode(secret.removeprefix(PREFIX), validate=True)
    return "v1," + b64encode(hmac.digest(key, signed, hashlib.sha256)).decode("ascii")
