"""Who may wait. Owns the counts of requests that are accepted but not yet scheduled, in all and by tenant."""

from __future__ import annotations

from aiexport_edge.engine.server.errors import RequestError
from aiexport_edge.proto import engine_pb2 as pb

_RETRY_MS = 1000


class Admission:
    """A bounded queue, of which each tenant can fill `tenant_share` at most (always at least one place)."""

    def __init__(self, queue_size: int, tenant_share: float) -> None:
        self._queue_size = queue_size
        self._tenant_places = max(1, int(queue_size * tenant_share))
        self._waiting = 0
        self._by_tenant: dict[str, int] = {}

    def enter(self, tenant: str) -> None:
        """Takes a place; `leave` gives it back. Raises `RequestError`."""
        of_tenant = self._by_tenant.get(tenant, 0)
        if of_tenant >= self._tenant_places:
            raise RequestError(
                pb.ERROR_TENANT_QUEUE_FULL,
                f"{of_tenant} of your requests are waiting already, which is your share of the queue; "
                "try again when some have begun.",
                limit=self._tenant_places,
                actual=of_tenant,
                retry_after_ms=_RETRY_MS,
            )
        if self._waiting >= self._queue_size:
            raise RequestError(
                pb.ERROR_QUEUE_FULL,
                f"The queue is full ({self._waiting} requests are waiting); try again in a moment.",
                limit=self._queue_size,
                actual=self._waiting,
                retry_after_ms=_RETRY_MS,
            )
        self._by_tenant[tenant] = of_tenant + 1
        self._waiting += 1

    def leave(self, tenant: str) -> None:
        """The request has been scheduled, or has ended before that."""
        self._waiting -= 1
        if self._by_tenant[tenant] == 1:
            del self._by_tenant[tenant]
        else:
            self._by_tenant[tenant] -= 1
