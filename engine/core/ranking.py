"""Who goes first: the class whose turn it is, then the tenant that has been served least, then who came first.

Owns the queues of requests that have prompt left to compute, by class, and the counters of what has been served. Knows
no pages and no budgets.
"""

from __future__ import annotations

from aiexport_edge.engine.core.fairness import FloorShare
from aiexport_edge.engine.core.protocol import Priority
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.waiting import TenantQueues


class Ranking:
    """`batch_floor_share`, in [0, 1), is what the batch class keeps of the service while interactive requests would
    take everything; it gets it in turns of `turn_cost`.
    """

    def __init__(self, *, batch_floor_share: float, turn_cost: float) -> None:
        self.queues = {priority: TenantQueues() for priority in Priority}
        self.num_batch = 0  # requests of the batch class, wherever they stand
        self.batch_first = False  # in the step that is being planned
        self._floor = FloorShare(share=batch_floor_share, quantum=turn_cost)
        self._served = dict.fromkeys(Priority, 0.0)  # cost since the last step was begun

    def arrive(self, request: Request) -> None:
        """A request is there."""
        self.num_batch += request.priority is Priority.BATCH

    def leave(self, request: Request) -> None:
        """A request has ended."""
        if request.priority is Priority.BATCH:
            self.num_batch -= 1
            if not self.num_batch:
                self._floor.clear()

    def queue(self, request: Request) -> TenantQueues:
        """Its class's."""
        return self.queues[request.priority]

    def charge(self, request: Request, cost: float) -> None:
        """Count service to the request's tenant and class."""
        priority = request.priority
        self.queues[priority].counter.charge(request.tenant, cost, request.weight)
        self._served[priority] += cost

    def begin_step(self) -> None:
        """Decide which class goes first: for a whole step, whatever its charges are."""
        served = self._served
        if self.num_batch:
            self._floor.charge(higher=served[Priority.INTERACTIVE], lower=served[Priority.BATCH])
        self._served = dict.fromkeys(Priority, 0.0)
        self.batch_first = self._floor.due

    @property
    def batch_is_overdue(self) -> bool:
        """Whether being first has not been enough for the batch class."""
        return self._floor.overdue

    def classes(self) -> tuple[Priority, Priority]:
        """The class to be served first, and the other."""
        if self.batch_first:
            return Priority.BATCH, Priority.INTERACTIVE
        return Priority.INTERACTIVE, Priority.BATCH

    def rank(self, request: Request) -> tuple[bool, float, int]:
        """A key to sort requests by: the first deserves the most, the last is preempted first."""
        first, _ = self.classes()
        counter = self.queues[request.priority].counter.counter(request.tenant)
        return request.priority is not first, counter, request.arrival
