"""From a credential to a principal, with a cache that every change to keys, clients and workspaces empties.

Changes made by any process show within a second: each raises the store's generation, which is polled here, and what is
cached counts only for `TRUST_S` after the last poll began. Nothing of a credential is ever logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.shim.auth.credentials import Presented, invalid, presented
from aiexport_edge.shim.auth.tokens import Tokens
from aiexport_edge.shim.errors import PermissionDenied
from aiexport_edge.shim.store import Principal, Store
from aiexport_edge.shim.store.errors import remedy
from aiexport_edge.shim.store.keys import KEY_PATTERN

POLL_S = 0.25
TRUST_S = 0.9
OAUTH_PLAN = "enterprise"
_CACHE_SIZE = 10_000

log = logging.getLogger(__name__)


class Authenticator:
    """Owns the cache. `run` for as long as it is used."""

    def __init__(self, store: Store, tokens: Tokens, threads: Executor) -> None:
        self._store = store
        self._tokens = tokens
        self._threads = threads
        self._cache: OrderedDict[bytes, Principal] = OrderedDict()  # by the credential's SHA-256
        self._generation: int | None = None  # of what is cached; None: nothing may be
        self._trusted_until = 0.0  # on the monotonic clock

    async def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        """Who asks. Raises `Unauthenticated`; one message for unknown, altered, revoked and expired credentials."""
        credential = presented(headers)
        digest = hashlib.sha256(credential.text.encode("latin-1")).digest()
        principal = self._cache.get(digest) if time.monotonic() < self._trusted_until else None
        if principal is None:
            principal = await self._look_up(credential, digest)
        if (
            principal is not None
            and hmac.compare_digest(principal.digest, digest)
            and (principal.kind == "key" or credential.bearer)
            and (principal.expires_at is None or principal.expires_at > datetime.now(UTC))
        ):
            return principal
        raise invalid(credential)

    async def run(self) -> None:
        """Polls the generation until cancelled, on a thread of its own: others' work must not delay a revocation."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "generation") as thread:
            while True:
                began = time.monotonic()
                try:
                    generation = await loop.run_in_executor(thread, self._store.generation)
                except SQLAlchemyError as error:
                    if self._generation is not None:
                        log.error("the store does not answer; keys are looked up one by one: %s", remedy(error))
                    self._forget(None)
                else:
                    if generation != self._generation:
                        self._forget(generation)
                    self._trusted_until = began + TRUST_S
                await asyncio.sleep(POLL_S)

    def forget(self) -> None:
        """Keys have been changed through this process: it need not wait for the next look at the store."""
        self._forget(None)

    def _forget(self, generation: int | None) -> None:
        self._cache.clear()
        self._tokens.forget()
        self._generation = generation

    async def _look_up(self, credential: Presented, digest: bytes) -> Principal | None:
        generation = self._generation
        loop = asyncio.get_running_loop()
        if KEY_PATTERN.fullmatch(credential.text):
            principal = await loop.run_in_executor(self._threads, self._store.find_principal, digest)
        elif credential.bearer and credential.text.count(".") == 2:
            principal = await loop.run_in_executor(self._threads, self._tokens.principal, credential.text)
        else:
            return None
        # What was read before a change may not stay in the cache after it.
        if principal is not None and generation is not None and generation == self._generation:
            self._cache[digest] = principal
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return principal


def require_scope(principal: Principal, scope: str) -> None:
    """Raises `PermissionDenied` unless the credential has `scope`, and its kind is one that the plan has."""
    if principal.kind == "token" and principal.plan != OAUTH_PLAN:
        raise PermissionDenied("OAuth access tokens are part of the Enterprise plan, which this workspace is not on.")
    if scope not in principal.scopes:
        what = "API key" if principal.kind == "key" else "access token"
        raise PermissionDenied(f'This {what} does not have the scope "{scope}".')
