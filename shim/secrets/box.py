"""Seals and opens secrets under the master keys: AES-256-GCM (NIST SP 800-38D) with a random nonce.

A sealed secret is: version 1 (1 byte) | id of the master key (8) | nonce (12) | ciphertext and tag. The purpose is
authenticated with it, so that a secret of one kind cannot be put in another's place. `cryptography` is imported when
the first secret is sealed or opened.
"""

from __future__ import annotations

import os

from aiexport_edge.shim.secrets.master_keys import MasterKey, MasterKeys, SecretError

_VERSION = b"\x01"
_ID = slice(1, 9)
_NONCE = slice(9, 21)
_CIPHERTEXT = slice(21, None)


class SecretBox:
    """Thread-safe. Both methods may read the master key's file: not on the path of a request."""

    def __init__(self, keys: MasterKeys) -> None:
        self.keys = keys

    def seal(self, plaintext: bytes, *, purpose: str) -> bytes:
        """`plaintext` under the newest master key, which is made where there is none. Raises `SecretError`."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = self.keys.newest()
        nonce = os.urandom(12)
        head = _VERSION + key.id
        return head + nonce + AESGCM(key.secret).encrypt(nonce, plaintext, head + purpose.encode())

    def open(self, sealed: bytes, *, purpose: str) -> bytes:
        """What was sealed for `purpose`. Raises `SecretError` where its master key is not here, or it was altered."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        key = self._key_of(sealed)
        head = sealed[: _NONCE.start]
        try:
            return AESGCM(key.secret).decrypt(sealed[_NONCE], sealed[_CIPHERTEXT], head + purpose.encode())
        except (InvalidTag, ValueError):
            raise SecretError(f"A stored secret ({purpose}) is damaged: it does not open. Make a new one.") from None

    def _key_of(self, sealed: bytes) -> MasterKey:
        key_id = master_key_id(sealed)
        for key in self.keys.all():
            if key.id == key_id:
                return key
        raise SecretError(
            f"A stored secret is sealed under the master key {key_id.hex()}, which is not here: restore it from its "
            f"backup to {self.keys.file}, or set AIEXPORT_MASTER_KEY."
        )


def master_key_id(sealed: bytes) -> bytes:
    """Under which master key something is sealed. Raises `SecretError` for what `seal` did not make."""
    if len(sealed) < _CIPHERTEXT.start or sealed[:1] != _VERSION:
        raise SecretError("A stored secret is damaged: it is not of a known form. Make a new one.")
    return sealed[_ID]
