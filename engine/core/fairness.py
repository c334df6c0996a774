"""Who has been served how much: fairness between tenants of a class, and the share that the lower class keeps.

Owns counters only: it knows tenants by name, no requests and no pages.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace

INPUT_COST = 1.0
OUTPUT_COST = 2.0  # an output token costs a step of its own: the paper's w_p = 1, w_q = 2

_MIN_SWEEP = 1024


class VirtualTokenCounter:
    """Virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI '24), algorithm 2 with
    weights: each tenant has a counter of the cost served to it, divided by its weight, and the tenant that waits with
    the least counter is served next.

    A tenant that begins to wait is lifted to the least counter among those that wait or, where none does, to that of
    the tenant that stopped last: nobody saves up service by being away. Between two tenants that wait all the while,
    the service differs by at most 2·max(w_p·L_input, w_q·M), with L_input the longest prompt and M the tokens that run
    at once.

    `least` and `charge` are O(log tenants), amortised.
    """

    __slots__ = ("_counters", "_heap", "_last", "_sequence", "_sweep_at", "_waiting")

    def __init__(self) -> None:
        self._counters: dict[str, float] = {}
        self._waiting: dict[str, int] = {}  # tenant → sequence number of when it began to wait
        # (counter when pushed, sequence, tenant). Counters only grow: an entry is a lower bound, refreshed at the top.
        self._heap: list[tuple[float, int, str]] = []
        self._sequence = 0
        self._last = ""  # the tenant that stopped waiting last
        self._sweep_at = _MIN_SWEEP

    def counter(self, tenant: str) -> float:
        """The weighted cost served to the tenant, lifts included."""
        return self._counters.get(tenant, 0.0)

    def start_waiting(self, tenant: str) -> None:
        """The tenant has work to be scheduled again, after it had none."""
        assert tenant not in self._waiting
        if max(len(self._counters), len(self._heap)) >= self._sweep_at:
            self._sweep()
        counter = max(self.counter(tenant), self._floor())
        self._counters[tenant] = counter
        self._sequence += 1
        self._waiting[tenant] = self._sequence
        heappush(self._heap, (counter, self._sequence, tenant))

    def stop_waiting(self, tenant: str) -> None:
        """All that the tenant asked for has been scheduled or is gone."""
        del self._waiting[tenant]
        self._last = tenant

    def least(self) -> str | None:
        """The waiting tenant with the least counter; among equals, the one that waits longest."""
        heap = self._heap
        while heap:
            counter, sequence, tenant = heap[0]
            if self._waiting.get(tenant) != sequence:
                heappop(heap)
            elif self._counters[tenant] > counter:
                heapreplace(heap, (self._counters[tenant], sequence, tenant))
            else:
                return tenant
        return None

    def charge(self, tenant: str, cost: float, weight: float) -> None:
        """Count service of `cost` to the tenant, waiting or not."""
        counters = self._counters
        counters[tenant] = counters.get(tenant, 0.0) + cost / weight

    def _floor(self) -> float:
        """The counter below which no tenant may start to wait."""
        least = self.least()
        return self.counter(self._last if least is None else least)

    def _sweep(self) -> None:
        """Forget tenants that a lift would put where they are, and entries of the heap that are void."""
        floor = self._floor()
        self._counters = {
            tenant: counter
            for tenant, counter in self._counters.items()
            if counter > floor or tenant in self._waiting or tenant == self._last
        }
        self._heap = [entry for entry in self._heap if self._waiting.get(entry[2]) == entry[1]]
        heapify(self._heap)
        self._sweep_at = max(_MIN_SWEEP, 2 * len(self._counters), 2 * len(self._heap))


class FloorShare:
    """The share of service that the lower class keeps while the higher class would take everything.

    While the lower class has requests, it earns `share` of all cost served and pays for what is served to it. It is
    *due* from when it has earned `quantum` until it has nothing left, so that a turn is long enough to be worth a
    recompute. It is *overdue* at 16 quanta: only then does the higher class stop being admitted to let a large request
    in.
    """

    __slots__ = ("_credit", "_quantum", "_share", "due")

    def __init__(self, *, share: float, quantum: float) -> None:
        assert 0.0 <= share < 1.0
        self._share = share
        self._quantum = quantum
        self._credit = 0.0
        self.due = False

    @property
    def overdue(self) -> bool:
        """Whether being first has not been enough."""
        return self._credit >= 16 * self._quantum

    def charge(self, *, higher: float, lower: float) -> None:
        """Count what was served to each class while the lower had requests."""
        credit = self._credit + self._share * (higher + lower) - lower
        self._credit = min(max(credit, 0.0), 16 * self._quantum)
        self.due = self._credit >= self._quantum or (self.due and self._credit > 0.0)

    def clear(self) -> None:
        """The lower class has no requests: it saves nothing up."""
        self._credit = 0.0
        self.due = False
