"""The requests of one class that have prompt left to compute, by tenant, and in what order a tenant's own go.

Owns that order. Knows no pages and no budgets: the scheduler asks for the head and decides.

A tenant's requests begin in order of arrival, and those of like length stay in it. Short ones do not wait behind one
that is many times longer, though: once the oldest runs, what others have left to compute decides. The one with the
least, if that is no more than a part of what the oldest has left, takes turns with it: each gets half of the tenant's
prefill. So every request is done after at most twice the work that stood before it when it came, whatever comes later.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush

from aiexport_edge.engine.core.fairness import VirtualTokenCounter
from aiexport_edge.engine.core.request import Request, Status

MUCH_SHORTER = 4  # times as much has the oldest left of its prompt as one that does not wait for it


class TenantQueues:
    """One queue a tenant; the head is a request of the tenant that has been served least.

    A request stays while its prompt is computed in chunks: a head is half done or has yet to be admitted.
    Every operation is O(log requests) or better, beside the few of a tenant that are half done.
    """

    __slots__ = ("_queues", "counter")

    def __init__(self) -> None:
        self.counter = VirtualTokenCounter()
        self._queues: dict[str, _Queue] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def head(self) -> Request | None:
        """The next request to be served, or None."""
        tenant = self.counter.least()
        return None if tenant is None else self._queues[tenant].head()

    def append(self, request: Request) -> None:
        """Add a request that has just arrived."""
        self._queue(request.tenant).add(request)

    def put_back(self, request: Request) -> None:
        """Add a preempted request: before all others of its tenant, because the scheduler preempts its latest first."""
        queue = self._queue(request.tenant)
        queue.add(request)
        queue.requests.move_to_end(request.handle, last=False)

    def serve(self, request: Request, cost: float) -> None:
        """A chunk of a request has been planned. One that is not in its queue takes nobody's turn."""
        queue = self._queues.get(request.tenant)
        if queue is not None and request.handle in queue.requests:
            queue.serve(request, cost)

    def remove(self, request: Request) -> None:
        """Take a request out: its prompt is computed, or it has ended."""
        queue = self._queues[request.tenant]
        del queue.requests[request.handle]
        if not queue.requests:
            del self._queues[request.tenant]
            self.counter.stop_waiting(request.tenant)

    def _queue(self, tenant: str) -> _Queue:
        queue = self._queues.get(tenant)
        if queue is None:
            self.counter.start_waiting(tenant)
            queue = self._queues[tenant] = _Queue()
        return queue


class _Queue:
    """The requests of one tenant, never none for long."""

    __slots__ = ("_debt", "_half_done", "_short", "requests")

    def __init__(self) -> None:
        self.requests: OrderedDict[int, Request] = OrderedDict()  # the oldest first
        # (tokens, arrival, request) of those that have not begun, the shortest first. Who has begun, and who has gone,
        # is found out at the top.
        self._short: list[tuple[int, int, Request]] = []
        self._half_done: dict[int, Request] = {}
        self._debt = 0.0  # what others have been served while the oldest ran and has not been since

    def head(self) -> Request:
        oldest = next(iter(self.requests.values()))
        # One that has yet to be admitted goes before all: nobody takes the pages that it waits for.
        if oldest.status is not Status.RUNNING or self._debt > 0 or len(self.requests) == 1:
            return oldest
        shortest = min(self._candidates(), key=lambda request: (_num_left(request), request.arrival), default=oldest)
        return shortest if _num_left(shortest) * MUCH_SHORTER <= _num_left(oldest) else oldest

    def add(self, request: Request) -> None:
        self.requests[request.handle] = request
        if request.status is Status.RUNNING:
            self._half_done[request.handle] = request
            return
        if len(self._short) > 2 * len(self.requests) + 64:  # mostly void
            self._short = [entry for entry in self._short if self._is_here(entry[2])]
            heapify(self._short)
        heappush(self._short, (len(request.token_ids), request.arrival, request))

    def serve(self, request: Request, cost: float) -> None:
        oldest = next(iter(self.requests.values()))
        if request is oldest:
            self._debt = max(0.0, self._debt - cost)
        elif oldest.status is Status.RUNNING:
            self._debt += cost

    def _candidates(self) -> list[Request]:
        """Those that are half done, and the shortest of those that have not begun."""
        for request in [request for request in self._half_done.values() if not self._runs_here(request)]:
            del self._half_done[request.handle]
            if self._is_here(request):  # preempted where it stood
                heappush(self._short, (len(request.token_ids), request.arrival, request))
        while self._short:
            request = self._short[0][2]
            if self._is_here(request) and request.status is not Status.RUNNING:
                return [*self._half_done.values(), request]
            heappop(self._short)
            if self._is_here(request):
                self._half_done[request.handle] = request
        return list(self._half_done.values())

    def _is_here(self, request: Request) -> bool:
        return self.requests.get(request.handle) is request

    def _runs_here(self, request: Request) -> bool:
        return request.status is Status.RUNNING and self._is_here(request)


def _num_left(request: Request) -> int:
    """Tokens that are still to be computed."""
    return len(request.token_ids) - request.num_computed_tokens
