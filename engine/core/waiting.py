"""The requests of one class that have prompt left to compute, by tenant and in order of arrival.

Owns that order. Knows no pages and no budgets: the scheduler asks for the head and decides.
"""

from __future__ import annotations

from collections import OrderedDict

from aiexport_edge.engine.core.fairness import VirtualTokenCounter
from aiexport_edge.engine.core.request import Request


class TenantQueues:
    """One queue a tenant; the head is the oldest request of the tenant that has been served least.

    A request stays while its prompt is computed in chunks: a head is half done or has yet to be admitted.
    Every operation is O(log tenants) or better.
    """

    __slots__ = ("_queues", "counter")

    def __init__(self) -> None:
        self.counter = VirtualTokenCounter()
        self._queues: dict[str, OrderedDict[int, Request]] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def head(self) -> Request | None:
        """The next request to be served, or None."""
        tenant = self.counter.least()
        return None if tenant is None else next(iter(self._queues[tenant].values()))

    def append(self, request: Request) -> None:
        """Add a request that has just arrived."""
        self._queue(request.tenant)[request.handle] = request

    def put_back(self, request: Request) -> None:
        """Add a preempted request: before all others of its tenant, because the scheduler preempts its latest first."""
        queue = self._queue(request.tenant)
        queue[request.handle] = request
        queue.move_to_end(request.handle, last=False)

    def remove(self, request: Request) -> None:
        """Take a request out: its prompt is computed, or it has ended."""
        queue = self._queues[request.tenant]
        del queue[request.handle]
        if not queue:
            del self._queues[request.tenant]
            self.counter.stop_waiting(request.tenant)

    def _queue(self, tenant: str) -> OrderedDict[int, Request]:
        queue = self._queues.get(tenant)
        if queue is None:
            self.counter.start_waiting(tenant)
            queue = self._queues[tenant] = OrderedDict()
        return queue
