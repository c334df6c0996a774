"""Which tokens of which requests are computed next, over all models of a core.

Owns the requests between their arrival and their end, and the page pool. Knows no tensors, no text and no time; it
decides on numbers of tokens and pages alone, and `commit` tells it what came of a plan.

    add ──▶ waiting ──admit──▶ prefilling ──last chunk──▶ decoding ──finish──▶ gone
               ▲                │  ▲  │                      │
               │                ▼  │  │                      │
               │               looking│                      │
               └────────────────┴─────┴────── preempt ───────┘

A request is admitted with pages for all the tokens it has, so a prefill once begun never waits for memory: only
decodes grow. When a decode cannot, the lowest in rank among the running are preempted until the others can: the highest
always goes on, so some request always comes to its end. Rank is class, then the tenant's counter, then arrival.

A prefill that comes to a picture which is not encoded looks at it: the vision tower works in units, each step does some
of them beside the prefills of others, and shares them among all that look. So no picture holds up a decode for longer
than a part of a step, and its tokens are cut into chunks like any others.

A step may be planned while the one before it is in flight: planned, and not yet committed. What it computes and draws
then counts as done, its ids pending. A request that ends meanwhile keeps its pages until no step in flight may write to
them. Whatever cannot be done so (a preemption, a step on probation) is put off until nothing is in flight: the plan is
then an empty one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from aiexport_edge.engine.core.adapter_slots import AdapterSlots
from aiexport_edge.engine.core.drafting import Drafting
from aiexport_edge.engine.core.drafts import DraftCost, Drafter
from aiexport_edge.engine.core.fairness import INPUT_COST, OUTPUT_COST, FloorShare
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pictures import Pictures
from aiexport_edge.engine.core.plan import PENDING_ID, Chunk, Encode, ModelPlan, StepPlan
from aiexport_edge.engine.core.prefill_pace import PrefillPace, StepBudget, cost_of
from aiexport_edge.engine.core.prefix import PrefixCache
from aiexport_edge.engine.core.protocol import Priority
from aiexport_edge.engine.core.request import Request, Status
from aiexport_edge.engine.core.waiting import TenantQueues

LOOKING_SHARE = 0.5  # of what prefills may cost in a step: what is kept for the vision towers' work


class Scheduler:
    """Each plan is committed, in order, at the latest after one more has been made; `add` and `finish` come in between.

    `revisions` and `tokens_per_page` are by model. A step has at most `max_step_tokens` tokens and `max_num_running`
    requests. `draft_cost` None: nobody drafts. `batch_floor_share`, in [0, 1), is what the batch class keeps of the
    service while interactive requests would take everything. `pace` None: prefills take what tokens decodes leave of a
    step. Each model has `num_adapter_slots` adapters on the device at most: a request whose adapter finds no place
    waits for one.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        revisions: Sequence[str],
        tokens_per_page: Sequence[int],
        max_num_running: int,
        max_step_tokens: int,
        batch_floor_share: float,
        pictures: Pictures | None = None,
        pace: PrefillPace | None = None,
        draft_cost: DraftCost | None = None,
        num_adapter_slots: int = 0,
    ) -> None:
        assert min(tokens_per_page) >= 1
        assert max_num_running >= 1
        assert max_step_tokens >= 1
        self.pool = pool
        self.prefix = PrefixCache(pool, revisions=revisions, tokens_per_page=tokens_per_page)
        self.pictures = pictures or Pictures([None] * len(revisions), capacity_bytes=0)
        self.requests: dict[int, Request] = {}  # every request that has not ended, by handle
        self.adapters = [AdapterSlots(num_adapter_slots) for _ in revisions]  # by model
        self.num_preemptions = 0
        self.num_prompt_tokens = [0] * len(revisions)  # by model, of requests that have started; counted by commit
        self.num_cached_tokens = [0] * len(revisions)
        self.num_output_tokens = [0] * len(revisions)
        self.num_guessed_tokens = [0] * len(revisions)  # of drafts
        self.num_accepted_tokens = [0] * len(revisions)  # of these, those that came true
        self.tokens_per_page = list(tokens_per_page)
        self._max_num_running = max_num_running
        self._max_step_tokens = max_step_tokens
        self._pace = pace
        self._drafting = None if draft_cost is None else Drafting(draft_cost, pool, self.tokens_per_page)
        self._queues = {priority: TenantQueues() for priority in Priority}
        self._running: dict[int, Request] = {}  # what holds pages: prefilling and decoding
        self._decoding: dict[int, Request] = {}
        self._ending: dict[int, Request] = {}  # the step that draws their budget's last id is in flight
        self._prefilling: dict[int, Request] = {}  # those on probation not included
        self._looking: dict[int, Request] = {}  # the next token is of a picture to be encoded; without probation
        self._probation: dict[int, Request] = {}  # until their prompt is computed
        self._num_batch = 0
        # A turn of the batch class is worth a full step of output.
        self._floor = FloorShare(share=batch_floor_share, quantum=OUTPUT_COST * max_step_tokens)
        self._served = dict.fromkeys(Priority, 0.0)  # cost since the last plan
        self._batch_first = False
        self._shortfalls: dict[int, int] = {}  # pages that were wanted by a head that did not fit, by handle
        self._was_alone = False  # the last step belonged to a request on probation
        self._num_in_flight = 0  # plans that have not been committed
        self._expected: list[bytes] = []  # pages that the plan in the making fills
        self._flights: deque[list[bytes]] = deque()  # and those that plans in flight fill
        self._probation_in_flight = False
        self._wants_preemption = False  # a head could be admitted so, when nothing is in flight

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that have yet to be admitted, or admitted again."""
        return len(self.requests) - len(self._running)

    def capacity_tokens(self, model: int) -> int:
        """Tokens that the whole pool holds for a model."""
        return self.pool.num_total * self.tokens_per_page[model]

    def fits(self, num_tokens: int, model: int) -> bool:
        """Whether a request of so many tokens, prompt and budget together, can ever run."""
        return num_tokens <= self.capacity_tokens(model)

    # ------------------------------------------------------------------------------------------ what comes and goes

    def add(self, request: Request) -> None:
        """Queue a request. The caller has seen to it that it `fits` and has something to compute."""
        assert request.handle not in self.requests
        assert request.token_ids, "nothing to compute"
        assert self.fits(request.num_prompt_tokens + request.max_tokens, request.model), "can never run"
        self.requests[request.handle] = request
        if self._drafting is not None:
            request.drafter = Drafter(request.token_ids)
        self._num_batch += request.priority is Priority.BATCH
        if request.probation:
            self._probation[request.handle] = request
        else:
            self._queues[request.priority].append(request)

    def finish(self, request: Request) -> None:
        """End a request, whatever it is doing; its pages go back as soon as no step in flight may write to them."""
        handle = request.handle
        del self.requests[handle]
        if request.status is Status.RUNNING:
            del self._running[handle]
            if not request.num_in_flight:
                self._release_pages(request)
        if handle in self._decoding:
            del self._decoding[handle]
        elif handle in self._ending:
            del self._ending[handle]
        elif handle in self._probation:
            del self._probation[handle]
        elif handle in self._looking:
            del self._looking[handle]
        else:
            self._prefilling.pop(handle, None)
            self._queues[request.priority].remove(request)
        self.pictures.release(request, request.num_prompt_tokens)
        self._shortfalls.pop(handle, None)
        request.status = Status.FINISHED
        if request.priority is Priority.BATCH:
            self._num_batch -= 1
            if not self._num_batch:
                self._floor.clear()

    def charge(self, request: Request, cost: float) -> None:
        """Count service to the request's tenant and class."""
        priority = request.priority
        self._queues[priority].counter.charge(request.tenant, cost, request.weight)
        self._served[priority] += cost

    def settle(self) -> None:
        """The step of the oldest plan in flight is over; `commit` goes on from here, request by request."""
        self._num_in_flight -= 1
        self.prefix.settle(self._flights.popleft())

    def release_late(self, request: Request) -> None:
        """A step of a request that has ended is over: take its pages back, if that was the last."""
        if not request.num_in_flight:
            self._release_pages(request)

    # ---------------------------------------------------------------------------------------------------- the plan

    def plan(self) -> StepPlan:
        """The next step, which is in flight from now on; empty exactly when there is none before what is in flight has
        been committed. While nothing is, there is one as long as there are requests."""
        if self._num_in_flight and (self._probation or self._probation_in_flight or self._wants_preemption):
            return StepPlan([])
        self._wants_preemption = False
        plan = self._next_plan()
        if plan.models:
            plan.dropped.extend(self.pictures.take_dropped())
            self._launch(plan)
        return plan

    def _launch(self, plan: StepPlan) -> None:
        """Count as done what `plan` will do."""
        self._num_in_flight += 1
        self._flights.append(self._expected)
        self._expected = []
        first = plan.models[0]
        self._probation_in_flight = (first.chunks or first.encodes)[0].request.probation
        for model_plan in plan.models:
            for chunk in model_plan.chunks:
                request = chunk.request
                request.num_in_flight += 1
                request.num_computed_tokens = chunk.start + chunk.num_tokens - len(chunk.draft)
                request.is_drafted = bool(chunk.draft)
                if request.pictures:
                    self.pictures.release(request, request.num_computed_tokens)
                if chunk.samples:
                    request.token_ids.append(PENDING_ID)
                    if len(request.token_ids) - request.num_prompt_tokens >= request.max_tokens:
                        self._ending[request.handle] = self._decoding.pop(request.handle)

    def _next_plan(self) -> StepPlan:
        self._settle_shares()
        if self._probation and not self._was_alone:
            plan = self._plan_alone()
            if plan.models:
                self._was_alone = True
                return plan
        plan = self._plan_together()
        self._was_alone = False
        if not plan.models and self._probation:
            plan = self._plan_alone()
        return plan

    def _plan_alone(self) -> StepPlan:
        """A step for one request on probation: if it kills the process, it takes no other with it."""
        request = min(self._probation.values(), key=lambda r: (r.status is not Status.RUNNING, r.priority, r.arrival))
        if request.status is not Status.RUNNING and not self._admit(request):
            return StepPlan([])
        encodes: list[Encode] = []
        chunks: list[Chunk] = []
        budget = self._budget(self._max_step_tokens, beside_decodes=False)
        self._prefill(request, budget, chunks)
        if not chunks and self._look(request, self._effort(beside_decodes=False), encodes)[0]:
            self._prefill(request, budget, chunks)
        return StepPlan([ModelPlan(request.model, chunks, encodes)] if chunks or encodes else [])

    def _plan_together(self) -> StepPlan:
        num_preemptions = self.num_preemptions
        decodes, growing, budget = self._plan_decodes()
        if growing:
            if self._num_in_flight and sum([self._missing_pages(r) for r in growing]) > self.pool.num_available:
                return StepPlan([])
            budget += self._grow(growing, decodes)
        prefills: list[Chunk] = []
        left = self._budget(budget, beside_decodes=bool(decodes))
        if self._looking:
            left.reserve(self._effort(beside_decodes=bool(decodes)))
        # After a famine nobody is admitted in the same step, and a request on probation that waits for room goes first.
        admissions = self.num_preemptions == num_preemptions and not any(h in self._shortfalls for h in self._probation)
        for priority in self._classes():
            blocked = self._plan_prefills(priority, left, prefills, admissions)
            if blocked and (priority is Priority.INTERACTIVE or self._floor.overdue):
                admissions = False
            if self.num_preemptions != num_preemptions:
                admissions = False  # what has just been preempted does not come back in the same step
        if self.num_preemptions != num_preemptions:
            decodes = [chunk for chunk in decodes if chunk.request.status is Status.RUNNING]
        elif self._drafting is not None and decodes:
            num_left = self._max_step_tokens - sum([chunk.num_tokens for chunk in decodes + prefills])
            num_kept = math.inf if self._shortfalls else len(self._running)
            self._drafting.add(decodes, prefills, num_left=num_left, num_kept=num_kept)
        encodes = self._plan_encodes(left, prefills, beside_decodes=bool(decodes)) if self._looking else []
        chunks: list[list[Chunk]] = [[] for _ in self.tokens_per_page]
        for chunk in decodes:
            chunks[chunk.request.model].append(chunk)
        for chunk in prefills:
            chunks[chunk.request.model].append(chunk)
        if not encodes:
            return StepPlan([ModelPlan(model, of_model) for model, of_model in enumerate(chunks) if of_model])
        plans = [
            ModelPlan(model, of_model, [encode for encode in encodes if encode.request.model == model])
            for model, of_model in enumerate(chunks)
        ]
        return StepPlan([plan for plan in plans if plan.chunks or plan.encodes])

    def _plan_decodes(self) -> tuple[list[Chunk], list[Request], int]:
        """The decodes of this step, those of them that lack pages, and the tokens left for prefills."""
        requests: Collection[Request] = self._decoding.values()
        if self._num_in_flight and self._drafting is not None:
            requests = self._drafting.without_those_that_sit_out(requests)
        chunks, growing, budget = self._decode_chunks(requests)
        if len(chunks) < len(requests):  # the budget does not do for all
            chunks, growing, budget = self._decode_chunks(sorted(requests, key=self._rank))
        return chunks, growing, budget

    def _decode_chunks(self, requests: Iterable[Request]) -> tuple[list[Chunk], list[Request], int]:
        """Chunks in the order of `requests` as far as a step's budget goes, who lacks pages, the budget left."""
        tokens_per_page, budget = self.tokens_per_page, self._max_step_tokens
        chunks: list[Chunk] = []
        growing: list[Request] = []
        for request in requests:
            if not budget:
                break
            budget -= 1
            start = request.num_computed_tokens
            if start + 1 > len(request.pages) * tokens_per_page[request.model]:
                growing.append(request)
            chunks.append(Chunk(request, start, 1, samples=True))
        return chunks, growing, budget

    def _grow(self, growing: list[Request], chunks: list[Chunk]) -> int:
        """Give each request pages for all its tokens, preempting the lowest in rank when they do not suffice.

        Some of `growing` may have been preempted themselves. Returns the tokens that `chunks` will not compute then.
        """
        shortage = sum([self._missing_pages(r) for r in growing])
        famine = shortage > self.pool.num_available
        if famine:
            victims = sorted(self._running.values(), key=self._rank)
            while shortage > self.pool.num_available:
                victim = victims.pop()
                if victim in growing:
                    shortage -= self._missing_pages(victim)
                    growing.remove(victim)
                self._preempt(victim)
        for request in growing:
            request.pages.extend(self.pool.take(self._missing_pages(request)))
        return sum([c.num_tokens for c in chunks if c.request.status is not Status.RUNNING]) if famine else 0

    def _budget(self, num_tokens: int, *, beside_decodes: bool) -> StepBudget:
        """For the prefills of a step that has so many tokens left."""
        if self._pace is None:
            return StepBudget(num_tokens)
        return StepBudget(num_tokens, self._pace.beside_decodes if beside_decodes else self._pace.alone)

    def _plan_prefills(self, priority: Priority, budget: StepBudget, chunks: list[Chunk], admissions: bool) -> bool:
        """Spend the budget on a class: those half done and those to be admitted, the most deserving first.

        Returns whether a request is kept waiting for want of pages or of a place.
        """
        queues = self._queues[priority]
        blocked = False
        while budget and (request := queues.head()) is not None:
            if request.status is not Status.RUNNING and not (admissions and self._admit(request)):
                blocked = True
                break
            self._prefill(request, budget, chunks)
        if blocked and budget:
            half_done = [r for r in self._prefilling.values() if r.priority is priority]
            for request in sorted(half_done, key=self._rank):
                if budget:
                    self._prefill(request, budget, chunks)
        return blocked

    def _prefill(self, request: Request, budget: StepBudget, chunks: list[Chunk]) -> None:
        """Append the request's next chunk, up to the first picture that is not encoded: none where that comes first."""
        start = request.num_computed_tokens
        num_clear = num_left = len(request.token_ids) - start
        if request.images:
            num_clear = self.pictures.num_clear(request, start, min(num_left, budget.tokens))
        num_tokens = budget.take(start, num_clear, self._span(request.model)) if num_clear else 0
        if num_tokens == num_clear < min(num_left, num_tokens + budget.tokens):
            self._begin_looking(request)
        if num_tokens:
            chunks.append(self._prefill_chunk(request, start, num_tokens))

    def _span(self, model: int) -> float:
        return math.inf if self._pace is None else self._pace.spans[model]

    def _prefill_chunk(self, request: Request, start: int, num_tokens: int) -> Chunk:
        num_left = len(request.token_ids) - start
        fresh = start + num_tokens - max(start, request.num_charged_tokens)
        if fresh > 0:
            request.num_charged_tokens = start + num_tokens
            self.charge(request, INPUT_COST * fresh)
        self._expected += self.prefix.expect(request, start, start + num_tokens)
        handle = request.handle
        self._queues[request.priority].serve(request, cost_of(start, num_tokens, self._span(request.model)))
        if num_tokens == num_left:
            if handle in self._probation:
                del self._probation[handle]
            else:
                self._prefilling.pop(handle, None)
                self._queues[request.priority].remove(request)
            self._decoding[handle] = request
        elif handle not in self._probation and handle not in self._looking:
            self._prefilling[handle] = request
        return Chunk(request, start, num_tokens, num_tokens == num_left)

    # ----------------------------------------------------------------------------------------------------- pictures

    def _begin_looking(self, request: Request) -> None:
        handle = request.handle
        if handle not in self._probation:
            self._prefilling.pop(handle, None)
            self._queues[request.priority].remove(request)
            self._looking[handle] = request

    def _effort(self, *, beside_decodes: bool) -> float:
        """What the vision towers' work of a step may cost, in tokens of the decoder."""
        if self._pace is None:
            return LOOKING_SHARE * self._max_step_tokens
        return LOOKING_SHARE * (self._pace.beside_decodes if beside_decodes else self._pace.alone)

    def _plan_encodes(self, budget: StepBudget, chunks: list[Chunk], *, beside_decodes: bool) -> list[Encode]:
        """Work on the pictures of all that look, the same for each as far as units go, the most deserving first. Who
        has seen goes on with what is left of the step's tokens."""
        encodes: list[Encode] = []
        effort = self._effort(beside_decodes=beside_decodes)
        looking = sorted(self._looking.values(), key=self._rank)
        for index, request in enumerate(looking):
            share = effort / (len(looking) - index)
            while request.handle in self._looking:
                has_seen, cost = self._look(request, share, encodes)
                share -= cost
                effort -= cost
                if not has_seen:
                    break
                del self._looking[request.handle]
                self._queues[request.priority].put_back(request)
                self._prefilling[request.handle] = request
                for chunk in [chunk for chunk in chunks if chunk.request is request]:
                    chunks.remove(chunk)  # a longer one takes its place
                    budget.give_back(chunk.start, chunk.num_tokens, self._span(request.model))
                if budget:
                    self._prefill(request, budget, chunks)
        return encodes

    def _look(self, request: Request, effort: float, encodes: list[Encode]) -> tuple[bool, float]:
        """Plan work on the picture that keeps the request waiting, as far as `effort` goes, in tokens; one unit is
        always planned where a step has none yet. Returns whether it has been seen then, and what the work costs."""
        index, picture = request.looking_at, self.pictures.looked_at(request)
        if picture is None or picture.is_ready:
            return picture is not None, 0.0
        num_units = max(int(effort / picture.unit_cost), 0 if encodes else 1)
        if not num_units:
            return False, 0.0
        num_units = min(num_units, picture.num_units - picture.num_done)
        cost = num_units * picture.unit_cost
        if request.num_charged_tokens <= request.spans[index].start:
            self.charge(request, INPUT_COST * cost)
        encodes.append(Encode(request, index, picture.key, num_units))
        self.pictures.advance(picture, num_units)
        return picture.is_ready, cost

    # ------------------------------------------------------------------------------------------ admission, preemption

    def _admit(self, request: Request) -> bool:
        """Give the request a place and pages for all its tokens, if there is room; interactive takes it from batch.

        Where others are computing most of its pages just now, it waits for them: a step, or two that overlap.
        """
        tokens_per_page = self.tokens_per_page[request.model]
        num_pages = -(-len(request.token_ids) // tokens_per_page)
        wanted = self._shortfalls.get(request.handle)
        if wanted is not None and not self._has_room(wanted) and not self._may_preempt_for(request, wanted):
            return False
        prefix = self.prefix.find(request)
        if self.prefix.is_worth_waiting(request, len(prefix)):
            return False
        wanted = num_pages - sum([self.pool.is_used(page) for page in prefix])
        if not self._has_room(wanted) and self._may_preempt_for(request, wanted):
            if self._num_in_flight:
                self._wants_preemption = True
                return False
            batch = sorted((r for r in self._running.values() if r.priority is Priority.BATCH), key=self._rank)
            while batch and not self._has_room(wanted):
                self._preempt(batch.pop())
                wanted = num_pages - sum([self.pool.is_used(page) for page in prefix])
        if not self._has_room(wanted):
            self._shortfalls[request.handle] = wanted
            return False
        self._shortfalls.pop(request.handle, None)
        if request.adapter is not None:
            slot = self.adapters[request.model].take(request.adapter.digest)
            if slot is None:
                return False
            request.adapter_slot = slot
        self.pool.share(prefix)
        request.pages = prefix + self.pool.take(num_pages - len(prefix))
        request.num_published_pages = len(prefix)
        request.num_computed_tokens = len(prefix) * tokens_per_page
        if not request.started:
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        request.status = Status.RUNNING
        self._running[request.handle] = request
        return True

    def _has_room(self, num_pages: int) -> bool:
        """Whether there is a place and so many pages, with one more for each that runs to grow into (within reason)."""
        num_running = len(self._running)
        margin = min(num_running, max(1, self.pool.num_total // 8))
        return num_running < self._max_num_running and num_pages + margin <= self.pool.num_available

    def _may_preempt_for(self, request: Request, num_pages: int) -> bool:
        """Whether preempting batch requests is allowed for this request, and can be enough."""
        if request.priority is Priority.BATCH or self._batch_first or not self._num_batch:
            return False
        num_held = [len(r.pages) for r in self._running.values() if r.priority is Priority.BATCH]
        return bool(num_held) and num_pages <= self.pool.num_available + sum(num_held)

    def _preempt(self, request: Request) -> None:
        assert not request.num_in_flight, "its pages may still be written to"
        handle = request.handle
        del self._running[handle]
        self._release_pages(request)
        request.status = Status.PREEMPTED
        self.num_preemptions += 1
        if handle in self._decoding:
            del self._decoding[handle]
            request.num_charged_tokens = len(request.token_ids)
            self._queues[request.priority].put_back(request)
        elif handle in self._looking:
            del self._looking[handle]
            self._queues[request.priority].put_back(request)
        elif handle in self._prefilling:
            del self._prefilling[handle]
        self.pictures.release(request, request.num_prompt_tokens)

    def _release_pages(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages = []
        request.num_published_pages = 0
        request.num_computed_tokens = 0
        if request.adapter_slot >= 0:
            self.adapters[request.model].give_back(request.adapter_slot)
            request.adapter_slot = -1

    # -------------------------------------------------------------------------------------------------------- order

    def _classes(self) -> tuple[Priority, Priority]:
        """The classes, the one to be served first before the other."""
        if self._batch_first:
            return Priority.BATCH, Priority.INTERACTIVE
        return Priority.INTERACTIVE, Priority.BATCH

    def _rank(self, request: Request) -> tuple[bool, float, int]:
        """Sorts the running: the last is preempted first."""
        first, _ = self._classes()
        counter = self._queues[request.priority].counter.counter(request.tenant)
        return request.priority is not first, counter, request.arrival

    def _settle_shares(self) -> None:
        """Decide which class goes first: for a whole step, whatever its charges are."""
        served = self._served
        if self._num_batch:
            self._floor.charge(higher=served[Priority.INTERACTIVE], lower=served[Priority.BATCH])
        self._served = dict.fromkeys(Priority, 0.0)
        self._batch_first = self._floor.due

    def _missing_pages(self, request: Request) -> int:
        return -(-len(request.token_ids) // self.tokens_per_page[request.model]) - len(request.pages)
