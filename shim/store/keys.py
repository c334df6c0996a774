"""What a key is made of: its text, its hash, its scopes. Knows no table."""

from __future__ import annotations

import hashlib
import re
import secrets

SCOPES = ("messages", "batch", "usage", "keys")
DEFAULT_SCOPES = ("messages", "batch", "usage")
_LETTERS = b"0123456789abcdefghijklmnopqrstuv" * 8  # of each byte, by its last five bits
KEY_PATTERN = re.compile(r"axp_(?:live|test)_[A-Za-z0-9_-]{43}", re.ASCII)


def new_key(*, test: bool) -> str:
    """A key of 32 random bytes, in URL-safe base64 behind its prefix."""
    return f"axp_{'test' if test else 'live'}_{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> bytes:
    """SHA-256. A key is 256 random bits, so that a slow or salted hash would add nothing."""
    return hashlib.sha256(key.encode("ascii")).digest()


def new_id(prefix: str) -> str:
    """An opaque id: `prefix` and 120 random bits in 24 characters."""
    return prefix + secrets.token_bytes(24).translate(_LETTERS).decode("ascii")
