"""Which requests are in vLLM's hands and which wait before it: the classes, the tenants' shares, the suspects.

vLLM's own queue knows arrival and a priority, nothing of tenants. So it is kept short: no more is handed over than runs
at once, and who is next is decided here, by the rules and counters of the native scheduler. Owns that order alone: no
tokens, no pages, no time.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiexport_edge.engine.core.fairness import INPUT_COST, OUTPUT_COST, FloorShare
from aiexport_edge.engine.core.protocol import Priority
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.waiting import TenantQueues

TURN_TOKENS = 512  # a turn of the batch class is worth so many output tokens


@dataclass(frozen=True, slots=True)
class Move:
    """`request` is handed over, or taken back (`back`) to make room for one of a higher class."""

    request: Request
    back: bool


class Gate:
    """At most `max_num_running` requests are handed over. `batch_floor_share` as the native scheduler has it."""

    def __init__(self, *, max_num_running: int, batch_floor_share: float) -> None:
        self.running: dict[int, Request] = {}
        self.num_preemptions = 0
        self._max_num_running = max_num_running
        self._waiting: dict[int, Request] = {}  # those on probation included
        self._queues = {priority: TenantQueues() for priority in Priority}
        self._probation: dict[int, Request] = {}  # waiting
        self._num_batch = 0
        self._floor = FloorShare(share=batch_floor_share, quantum=OUTPUT_COST * TURN_TOKENS)
        self._served = dict.fromkeys(Priority, 0.0)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been handed over, or have been taken back."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """A request has come."""
        self._num_batch += request.priority is Priority.BATCH
        self._waiting[request.handle] = request
        if request.probation:
            self._probation[request.handle] = request
        else:
            self._queues[request.priority].append(request)

    def remove(self, request: Request) -> None:
        """It has ended, wherever it is."""
        handle = request.handle
        if self.running.pop(handle, None) is None:
            del self._waiting[handle]
            if self._probation.pop(handle, None) is None:
                self._queues[request.priority].remove(request)
        self._num_batch -= request.priority is Priority.BATCH
        if not self._num_batch:
            self._floor.clear()

    def charge(self, request: Request, num_tokens: int) -> None:
        """So many output tokens were made for it."""
        self._charge(request, OUTPUT_COST * num_tokens)

    def next(self) -> Move | None:
        """The next thing to do, already counted as done; None when all is as it should be.

        A request on probation is handed over alone, and the next one only when it has produced a token: if it ends the
        process, it takes no other with it.
        """
        if any(request.probation for request in self.running.values()):
            return None
        has_place = len(self.running) < self._max_num_running
        if self._probation:
            if not has_place:
                return None
            request = next(iter(self._probation.values()))
            del self._probation[request.handle]
            return self._hand_over(request)
        request_or_none = self._head()
        if request_or_none is None:
            return None
        if has_place:
            self._queues[request_or_none.priority].remove(request_or_none)
            return self._hand_over(request_or_none)
        return self._take_back(request_or_none)

    def _head(self) -> Request | None:
        if self._num_batch:
            self._floor.charge(higher=self._served[Priority.INTERACTIVE], lower=self._served[Priority.BATCH])
        self._served = dict.fromkeys(Priority, 0.0)
        order = (Priority.BATCH, Priority.INTERACTIVE) if self._floor.due else tuple(Priority)
        for priority in order:
            head = self._queues[priority].head()
            if head is not None:
                return head
        return None

    def _hand_over(self, request: Request) -> Move:
        del self._waiting[request.handle]
        self.running[request.handle] = request
        fresh = len(request.token_ids) - request.num_charged_tokens
        request.num_charged_tokens += fresh
        self._charge(request, INPUT_COST * fresh)
        return Move(request, back=False)

    def _take_back(self, request: Request) -> Move | None:
        """Room for an interactive request, from the batch request that began last; not while it is batch's turn."""
        if request.priority is Priority.BATCH or self._floor.due:
            return None
        batch = [running for running in self.running.values() if running.priority is Priority.BATCH]
        if not batch:
            return None
        victim = batch[-1]
        del self.running[victim.handle]
        self._waiting[victim.handle] = victim
        self._queues[Priority.BATCH].put_back(victim)
        victim.num_charged_tokens = len(victim.token_ids)  # what it has to compute again costs its tenant nothing
        self.num_preemptions += 1
        return Move(victim, back=True)

    def _charge(self, request: Request, cost: float) -> None:
        self._queues[request.priority].counter.charge(request.tenant, cost, request.weight)
        self._served[request.priority] += cost
