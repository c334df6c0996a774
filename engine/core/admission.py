"""Who is given a place, pages and a slot for its adapter, who loses them to others, and when they go back.

Owns who holds what of these. Knows no budgets of a step: `scheduler.py` says who is to run, here is whether there is
room.

A request is admitted with pages for all the tokens it has, so a prefill once begun never waits for memory: only
decodes grow. When a decode cannot, the lowest in rank among the running are preempted until the others can: the highest
always goes on, so some request always comes to its end.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiexport_edge.engine.core.adapter_slots import AdapterSlots
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pictures import Pictures
from aiexport_edge.engine.core.prefix import PrefixCache
from aiexport_edge.engine.core.protocol import Priority
from aiexport_edge.engine.core.ranking import Ranking
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.roster import Roster


class Admission:
    """At most `max_num_running` requests hold pages. Each model has `num_adapter_slots` adapters on the device at most:
    a request whose adapter finds no place waits for one. `tokens_per_page` is by model.
    """

    def __init__(
        self,
        pool: PagePool,
        prefix: PrefixCache,
        pictures: Pictures,
        *,
        ranking: Ranking,
        roster: Roster,
        tokens_per_page: Sequence[int],
        max_num_running: int,
        num_adapter_slots: int,
    ) -> None:
        self.num_preemptions = 0
        self.shortfalls: dict[int, int] = {}  # pages that were wanted by a head that did not fit, by handle
        self.wants_preemption = False  # a head could be admitted so, when nothing is in flight
        self._pool = pool
        self._prefix = prefix
        self._pictures = pictures
        self._ranking = ranking
        self._roster = roster
        self._tokens_per_page = tokens_per_page
        self._max_num_running = max_num_running
        self._adapters = [AdapterSlots(num_adapter_slots) for _ in tokens_per_page]  # by model

    def admit(self, request: Request, *, num_in_flight: int) -> bool:
        """Give the request a place and pages for all its tokens, if there is room; interactive takes it from batch, but
        not while steps are in flight.

        Where others are computing most of its pages just now, it waits for them: a step, or two that overlap.
        """
        tokens_per_page = self._tokens_per_page[request.model]
        num_pages = -(-len(request.token_ids) // tokens_per_page)
        wanted = self.shortfalls.get(request.handle)
        if wanted is not None and not self._has_room(wanted) and not self._may_preempt_for(request, wanted):
            return False
        prefix = self._prefix.find(request)
        if self._prefix.is_worth_waiting(request, len(prefix)):
            return False
        wanted = num_pages - sum([self._pool.is_used(page) for page in prefix])
        if not self._has_room(wanted) and self._may_preempt_for(request, wanted):
            if num_in_flight:
                self.wants_preemption = True
                return False
            running = self._roster.running.values()
            batch = sorted((r for r in running if r.priority is Priority.BATCH), key=self._ranking.rank)
            while batch and not self._has_room(wanted):
                self.preempt(batch.pop())
                wanted = num_pages - sum([self._pool.is_used(page) for page in prefix])
        if not self._has_room(wanted):
            self.shortfalls[request.handle] = wanted
            return False
        self.shortfalls.pop(request.handle, None)
        if request.adapter is not None:
            slot = self._adapters[request.model].take(request.adapter.digest)
            if slot is None:
                return False
            request.adapter_slot = slot
        self._pool.share(prefix)
        request.pages = prefix + self._pool.take(num_pages - len(prefix))
        request.num_published_pages = len(prefix)
        request.num_computed_tokens = len(prefix) * tokens_per_page
        if not request.started:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        self._roster.admit(request)
        return True

    def _has_room(self, num_pages: int) -> bool:
        """Whether there is a place and so many pages, with one more for each that runs to grow into (within reason)."""
        num_running = len(self._roster.running)
        margin = min(num_running, max(1, self._pool.num_total // 8))
        return num_running < self._max_num_running and num_pages + margin <= self._pool.num_available

    def _may_preempt_for(self, request: Request, num_pages: int) -> bool:
        """Whether preempting batch requests is allowed for this request, and can be enough."""
        if request.priority is Priority.BATCH or self._ranking.batch_first or not self._ranking.num_batch:
            return False
        num_held = [len(r.pages) for r in self._roster.running.values() if r.priority is Priority.BATCH]
        return bool(num_held) and num_pages <= self._pool.num_available + sum(num_held)

    def is_short(self, growing: Sequence[Request]) -> bool:
        """Whether there are no pages for all the tokens of these."""
        return sum([self._missing_pages(request) for request in growing]) > self._pool.num_available

    def grow(self, growing: list[Request]) -> None:
        """Give each request pages for all its tokens, preempting the lowest in rank when they do not suffice: some of
        `growing` may be among those.
        """
        if self.is_short(growing):
            victims = sorted(self._roster.running.values(), key=self._ranking.rank)
            while self.is_short(growing):
                victim = victims.pop()
                if victim in growing:
                    growing.remove(victim)
                self.preempt(victim)
        for request in growing:
            request.pages.extend(self._pool.take(self._missing_pages(request)))

    def _missing_pages(self, request: Request) -> int:
        return -(-len(request.token_ids) // self._tokens_per_page[request.model]) - len(request.pages)

    def preempt(self, request: Request) -> None:
        """Take back all that a running request holds; it waits again."""
        assert not request.num_in_flight, "its pages may still be written to"
        self._release(request)
        self._pictures.release(request, request.num_prompt_tokens)
        if request.handle in self._roster.decoding:
            request.num_charged_tokens = len(request.token_ids)  # some of them as output
        self._roster.preempt(request)
        self.num_preemptions += 1

    def withdraw(self, request: Request) -> None:
        """A request has ended; its pages go back as soon as no step in flight may write to them."""
        self.shortfalls.pop(request.handle, None)
        self._pictures.release(request, request.num_prompt_tokens)
        self.release_late(request)

    def release_late(self, request: Request) -> None:
        """Take back the pages of a request that has ended, unless a step of it is in flight."""
        if not request.num_in_flight:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._pool.release(request.pages)
        request.pages = []
        request.num_published_pages = 0
        request.num_computed_tokens = 0
        if request.adapter_slot >= 0:
            self._adapters[request.model].give_back(request.adapter_slot)
            request.adapter_slot = -1
