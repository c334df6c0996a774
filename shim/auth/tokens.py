"""OAuth access tokens: JSON Web Tokens in the profile of RFC 9068, signed with Ed25519 (RFC 8037).

Owns what a token says, which key signs it and which keys verify one. A token is good while its signature, audience and
time are, its client is not revoked and its workspace there; `principals` asks the store for the last two. Synchronous,
for a thread; `jwt` and `cryptography` are imported when the first token turns up.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Collection
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine

from aiexport_edge.shim.secrets import SecretBox
from aiexport_edge.shim.store import Principal, principals
from aiexport_edge.shim.store.oauth_rows import Grantee
from aiexport_edge.shim.store.signing_rows import SigningKey, SigningRows

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

LIFETIME = timedelta(seconds=3600)
ROTATE_AFTER = timedelta(days=30)  # a signing key that is older is replaced by the next token's
CLOCKS = timedelta(minutes=5)  # by which those of several machines may differ
KEPT = LIFETIME + CLOCKS  # a retired key verifies for so long
ISSUER = "aiexport-edge"
AUDIENCE = "aiexport-edge/v2"
PURPOSE = "signing key"
MAX_TOKEN_CHARS = 2048
_MAX_HEADER_CHARS = 200
_ALGORITHM = "EdDSA"
_CLAIMS = ("iss", "aud", "sub", "client_id", "workspace", "scope", "exp", "iat", "jti")


class SigningKeys:
    """The keys as they are in the store, private halves sealed."""

    def __init__(self, database: Engine, box: SecretBox) -> None:
        self._rows = SigningRows(database, KEPT)
        self._box = box

    def list(self) -> list[SigningKey]:
        """Those that sign or verify, newest first."""
        return self._rows.list()

    def current(self) -> SigningKey:
        """The key that signs: made where there is none, replaced where it is old. Raises `SecretError`."""
        for key in self._rows.list():
            if key.retired_at is None and key.created_at > datetime.now(UTC) - ROTATE_AFTER:
                return key
        return self._rows.rotate(self._make, unless_newer_than=ROTATE_AFTER)

    def rotate(self) -> SigningKey:
        """A new key signs from now on; live tokens stay good. Raises `SecretError`."""
        return self._rows.rotate(self._make, unless_newer_than=None)

    def drop_retired(self) -> int:
        """Ends every token that a retired key has signed; returns how many keys there were."""
        return self._rows.drop_retired()

    def open(self, key: SigningKey) -> Ed25519PrivateKey:
        """Raises `SecretError`."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._box.open(key.sealed_private_key, purpose=PURPOSE))

    def _make(self) -> tuple[bytes, bytes]:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        private_key = Ed25519PrivateKey.generate()
        sealed = self._box.seal(private_key.private_bytes_raw(), purpose=PURPOSE)
        return private_key.public_key().public_bytes_raw(), sealed


class Tokens:
    """Issues and verifies. Thread-safe. `forget` whenever the store's generation has changed."""

    def __init__(self, database: Engine, keys: SigningKeys) -> None:
        self._database = database
        self._keys = keys
        self._lock = threading.Lock()  # around both caches
        self._signing: tuple[str, Ed25519PrivateKey] | None = None
        self._verifying: dict[str, Ed25519PublicKey] = {}
        self._num_forgotten = 0

    def forget(self) -> None:
        """Asks the store for the verifying keys again."""
        with self._lock:
            self._verifying = {}
            self._num_forgotten += 1

    def issue(self, client: Grantee, scopes: Collection[str]) -> str:
        """A token for `LIFETIME`. Raises `SecretError` where the signing key cannot be opened."""
        import jwt

        key_id, private_key = self._signing_key()
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": client.client_id,
            "client_id": client.client_id,
            "workspace": client.workspace_id,
            "scope": " ".join(scopes),
            "iat": now,
            "exp": now + int(LIFETIME.total_seconds()),
            "jti": secrets.token_urlsafe(16),
        }
        return jwt.encode(claims, private_key, _ALGORITHM, headers={"kid": key_id, "typ": "at+jwt"})

    def principal(self, token: str) -> Principal | None:
        """Whom a token stands for; None for one that is not good."""
        claims = self._verified(token)
        if claims is None:
            return None
        client = principals.of_client(self._database, claims["client_id"])
        if client is None or client.workspace_id != claims["workspace"]:
            return None
        return replace(
            client,
            digest=hashlib.sha256(token.encode()).digest(),
            scopes=client.scopes.intersection(claims["scope"].split()),
            expires_at=datetime.fromtimestamp(claims["exp"], UTC),
        )

    def _verified(self, token: str) -> dict[str, Any] | None:
        """The claims. None unless we have signed them, for us, and they have not expired (RFC 7519, 7.2; RFC 8725)."""
        import jwt

        if len(token) > MAX_TOKEN_CHARS or not 0 < token.find(".") <= _MAX_HEADER_CHARS or not token.isascii():
            return None
        try:
            header = jwt.get_unverified_header(token)
            public_key = self._verifying_key(header.get("kid", ""))
            if public_key is None or header.get("typ") != "at+jwt":
                return None
            # `iat` is required, not compared: the clock of another machine that issued it may be ahead.
            options: Any = {"require": list(_CLAIMS), "verify_iat": False}
            claims: dict[str, Any] = jwt.decode(
                token, public_key, [_ALGORITHM], audience=AUDIENCE, issuer=ISSUER, options=options
            )
        except jwt.InvalidTokenError:
            return None
        # One issued while a clock had jumped ahead would live too long.
        return claims if claims["exp"] <= time.time() + KEPT.total_seconds() else None

    def _signing_key(self) -> tuple[str, Ed25519PrivateKey]:
        key = self._keys.current()
        with self._lock:
            if self._signing is not None and self._signing[0] == key.key_id:
                return self._signing
        signing = key.key_id, self._keys.open(key)
        with self._lock:
            self._signing = signing
        return signing

    def _verifying_key(self, key_id: str) -> Ed25519PublicKey | None:
        """A key that the caches do not hold may have been made by another process just now: the store is asked."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        with self._lock:
            if key_id in self._verifying:
                return self._verifying[key_id]
            asked = self._num_forgotten
        found = {key.key_id: Ed25519PublicKey.from_public_bytes(key.public_key) for key in self._keys.list()}
        with self._lock:
            if asked == self._num_forgotten:  # what was read before a change may not stay after it
                self._verifying = found
        return found.get(key_id)
