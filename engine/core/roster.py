"""Where each request of a core stands between its arrival and its end.

    add ──▶ waiting ──admit──▶ prefilling ──last chunk──▶ decoding ──last id planned──▶ ending ──▶ gone
               ▲                │  ▲  │                      │
               │                ▼  │  │                      │
               │               looking│                      │
               └────────────────┴─────┴────── preempt ───────┘

Owns these moves, below in the order of a request's way, and who is in the queue of its class: whoever waits or
prefills. A request on probation is in no queue, and stays where it is until its prompt is computed. Knows no pages and
no budgets: who moves is decided elsewhere.
"""

from __future__ import annotations

from aiexport_edge.engine.core.ranking import Ranking
from aiexport_edge.engine.core.request import Request, Status


class Roster:
    """Requests by handle, in the order in which they came to where they are. The dictionaries are for reading."""

    def __init__(self, ranking: Ranking) -> None:
        self.requests: dict[int, Request] = {}  # every request that has not ended
        self.running: dict[int, Request] = {}  # those that hold pages
        self.prefilling: dict[int, Request] = {}  # those of them that are half done, in their queues as well
        self.looking: dict[int, Request] = {}  # the next token is of a picture to be encoded
        self.decoding: dict[int, Request] = {}
        self.ending: dict[int, Request] = {}  # the step that draws their budget's last id is in flight
        self.probation: dict[int, Request] = {}  # until their prompt is computed
        self._ranking = ranking

    @property
    def num_waiting(self) -> int:
        """Requests that have yet to be admitted, or admitted again."""
        return len(self.requests) - len(self.running)

    def add(self, request: Request) -> None:
        """A new request waits."""
        assert request.handle not in self.requests
        self.requests[request.handle] = request
        self._ranking.arrive(request)
        if request.probation:
            self.probation[request.handle] = request
        else:
            self._ranking.queue(request).append(request)

    def admit(self, request: Request) -> None:
        """It has been given a place and pages."""
        request.status = Status.RUNNING
        self.running[request.handle] = request

    def keep_prefilling(self, request: Request) -> None:
        """A chunk of it has been planned, not its last."""
        handle = request.handle
        if handle not in self.probation and handle not in self.looking:
            self.prefilling[handle] = request

    def look(self, request: Request) -> None:
        """It has come to a picture that is not encoded, and others of its class go on meanwhile."""
        handle = request.handle
        if handle not in self.probation:
            self.prefilling.pop(handle, None)
            self._ranking.queue(request).remove(request)
            self.looking[handle] = request

    def resume(self, request: Request) -> None:
        """The picture that it looked at is there."""
        del self.looking[request.handle]
        self._ranking.queue(request).put_back(request)
        self.prefilling[request.handle] = request

    def decode(self, request: Request) -> None:
        """The last chunk of its prompt has been planned."""
        handle = request.handle
        if handle in self.probation:
            del self.probation[handle]
        else:
            self.prefilling.pop(handle, None)
            self._ranking.queue(request).remove(request)
        self.decoding[handle] = request

    def await_end(self, request: Request) -> None:
        """The step that draws its budget's last id has been planned."""
        self.ending[request.handle] = self.decoding.pop(request.handle)

    def preempt(self, request: Request) -> None:
        """It has lost its pages and waits again."""
        handle = request.handle
        del self.running[handle]
        request.status = Status.PREEMPTED
        if handle in self.decoding:
            del self.decoding[handle]
            self._ranking.queue(request).put_back(request)
        elif handle in self.looking:
            del self.looking[handle]
            self._ranking.queue(request).put_back(request)
        elif handle in self.prefilling:
            del self.prefilling[handle]

    def remove(self, request: Request) -> None:
        """It has ended, wherever it stood."""
        handle = request.handle
        del self.requests[handle]
        self.running.pop(handle, None)
        if handle in self.decoding:
            del self.decoding[handle]
        elif handle in self.ending:
            del self.ending[handle]
        elif handle in self.probation:
            del self.probation[handle]
        elif handle in self.looking:
            del self.looking[handle]
        else:
            self.prefilling.pop(handle, None)
            self._ranking.queue(request).remove(request)
        request.status = Status.FINISHED
        self._ranking.leave(request)

    def check(self) -> None:
        """Assert that everybody stands in one place; for tests."""
        places = [self.prefilling, self.looking, self.decoding, self.ending]
        handles = [handle for place in places for handle in place]
        assert len(handles) == len({*handles})
        assert not self.probation.keys() & {*handles}
        assert {*handles} <= self.running.keys() <= self.requests.keys()
        for handle, request in self.requests.items():
            assert (request.status is Status.RUNNING) == (handle in self.running)
            assert request.status is not Status.FINISHED
