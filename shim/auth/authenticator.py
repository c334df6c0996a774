"""From a credential to a principal, with a cache that every change to keys and workspaces empties.

Changes made by any process show within `POLL_S`: each raises the store's generation, which is polled here. Nothing of a
key is ever logged.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Executor
from datetime import UTC, datetime

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.shim.auth.credentials import presented_key, unauthenticated
from aiexport_edge.shim.errors import PermissionDenied
from aiexport_edge.shim.store import Principal, Store
from aiexport_edge.shim.store.keys import KEY_PATTERN, hash_key

POLL_S = 0.25
_CACHE_SIZE = 10_000

log = logging.getLogger(__name__)


class Authenticator:
    """Owns the cache. `run` for as long as it is used."""

    def __init__(self, store: Store, threads: Executor) -> None:
        self._store = store
        self._threads = threads
        self._cache: OrderedDict[bytes, Principal] = OrderedDict()
        self._generation: int | None = None  # of what is cached; None: nothing may be

    async def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> Principal:
        """Who asks. Raises `Unauthenticated`; one message for unknown, revoked and expired keys."""
        key = presented_key(headers)
        if KEY_PATTERN.fullmatch(key):
            digest = hash_key(key)
            principal = self._cache.get(digest) or await self._look_up(digest)
            if (
                principal is not None
                and hmac.compare_digest(principal.digest, digest)
                and (principal.expires_at is None or principal.expires_at > datetime.now(UTC))
            ):
                return principal
        raise unauthenticated("The API key is not valid: it is unknown, revoked or expired.")

    async def run(self) -> None:
        """Polls the generation until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                generation = await loop.run_in_executor(self._threads, self._store.generation)
            except SQLAlchemyError as error:
                if self._generation is not None:
                    log.error("the store does not answer; keys are looked up one by one: %s", error)
                self._forget(None)
            else:
                if generation != self._generation:
                    self._forget(generation)
            await asyncio.sleep(POLL_S)

    def _forget(self, generation: int | None) -> None:
        self._cache.clear()
        self._generation = generation

    async def _look_up(self, digest: bytes) -> Principal | None:
        generation = self._generation
        loop = asyncio.get_running_loop()
        principal = await loop.run_in_executor(self._threads, self._store.find_principal, digest)
        # What was read before a change may not stay in the cache after it.
        if principal is not None and generation is not None and generation == self._generation:
            self._cache[digest] = principal
            if len(self._cache) > _CACHE_SIZE:
                self._cache.popitem(last=False)
        return principal


def require_scope(principal: Principal, scope: str) -> None:
    """Raises `PermissionDenied` unless the key has `scope`."""
    if scope not in principal.scopes:
        raise PermissionDenied(f'This API key does not have the scope "{scope}".')
