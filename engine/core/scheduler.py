"""Which tokens of which requests are computed next, over all models of a core.

Owns what a step is made of: its budgets, its chunks, and what is in flight. Where a request stands is `roster.py`'s
(the drawing of its way is there), who goes first `ranking.py`'s, who has room `admission.py`'s, what pictures take of a
step `vision_work.py`'s. Knows no tensors, no text and no time; it decides on numbers of tokens and pages alone, and
`commit` tells it what came of a plan.

A step may be planned while the one before it is in flight: planned, and not yet committed. What it computes and draws
then counts as done, its ids pending. A request that ends meanwhile keeps its pages until no step in flight may write to
them. Whatever cannot be done so (a preemption, a step on probation) is put off until nothing is in flight: the plan is
then an empty one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

from aiexport_edge.engine.core.admission import Admission
from aiexport_edge.engine.core.drafting import Drafting
from aiexport_edge.engine.core.drafts import DraftCost, Drafter
from aiexport_edge.engine.core.fairness import INPUT_COST, OUTPUT_COST
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pictures import Pictures
from aiexport_edge.engine.core.plan import PENDING_ID, Chunk, Encode, ModelPlan, StepPlan
from aiexport_edge.engine.core.prefill_pace import PrefillPace, StepBudget, cost_of
from aiexport_edge.engine.core.prefix import PrefixCache
from aiexport_edge.engine.core.protocol import Priority
from aiexport_edge.engine.core.ranking import Ranking
from aiexport_edge.engine.core.request import Request, Status
from aiexport_edge.engine.core.roster import Roster
from aiexport_edge.engine.core.vision_work import VisionWork

LOOKING_SHARE = 0.5  # of what prefills may cost in a step: what is kept for the vision towers' work


class Scheduler:
    """Each plan is committed, in order, at the latest after one more has been made; `add` and `finish` come in between.

    `revisions` and `tokens_per_page` are by model. A step has at most `max_step_tokens` tokens and `max_num_running`
    requests. `draft_cost` None: nobody drafts. `batch_floor_share`, in [0, 1), is what the batch class keeps of the
    service while interactive requests would take everything. `pace` None: prefills take what tokens decodes leave of a
    step. Each model has `num_adapter_slots` adapters on the device at most.
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
        self.tokens_per_page = list(tokens_per_page)
        self.prefix = PrefixCache(pool, revisions=revisions, tokens_per_page=tokens_per_page)
        self.pictures = pictures or Pictures([None] * len(revisions), capacity_bytes=0)
        # A turn of the batch class is worth a full step of output.
        self.ranking = Ranking(batch_floor_share=batch_floor_share, turn_cost=OUTPUT_COST * max_step_tokens)
        self.num_prompt_tokens = [0] * len(revisions)  # by model, of requests that have started; counted by commit
        self.num_cached_tokens = [0] * len(revisions)
        self.num_output_tokens = [0] * len(revisions)
        self.num_guessed_tokens = [0] * len(revisions)  # of drafts
        self.num_accepted_tokens = [0] * len(revisions)  # of these, those that came true
        self.roster = Roster(self.ranking)
        self.requests = self.roster.requests  # every request that has not ended, by handle
        self.admission = Admission(
            pool,
            self.prefix,
            self.pictures,
            ranking=self.ranking,
            roster=self.roster,
            tokens_per_page=self.tokens_per_page,
            max_num_running=max_num_running,
            num_adapter_slots=num_adapter_slots,
        )
        self._vision_work = VisionWork(self.pictures, ranking=self.ranking, roster=self.roster)
        self._drafting = None if draft_cost is None else Drafting(draft_cost, pool, self.tokens_per_page)
        self._max_step_tokens = max_step_tokens
        self._pace = pace
        self._was_alone = False  # the last step belonged to a request on probation
        self._num_in_flight = 0  # plans that have not been committed
        self._probation_in_flight = False

    @property
    def num_running(self) -> int:
        """Requests that hold pages."""
        return len(self.roster.running)

    @property
    def num_waiting(self) -> int:
        """Requests that have yet to be admitted, or admitted again."""
        return self.roster.num_waiting

    @property
    def num_preemptions(self) -> int:
        """How often a request has lost its pages to another."""
        return self.admission.num_preemptions

    def capacity_tokens(self, model: int) -> int:
        """Tokens that the whole pool holds for a model."""
        return self.pool.num_total * self.tokens_per_page[model]

    def fits(self, num_tokens: int, model: int) -> bool:
        """Whether a request of so many tokens, prompt and budget together, can ever run."""
        return num_tokens <= self.capacity_tokens(model)

    # ------------------------------------------------------------------------------------------ what comes and goes

    def add(self, request: Request) -> None:
        """Queue a request. The caller has seen to it that it `fits` and has something to compute."""
        assert request.token_ids, "nothing to compute"
        assert self.fits(request.num_prompt_tokens + request.max_tokens, request.model), "can never run"
        self.roster.add(request)
        if self._drafting is not None:
            request.drafter = Drafter(request.token_ids)

    def settle(self) -> None:
        """The step of the oldest plan in flight is over; `commit` goes on from here, request by request."""
        self._num_in_flight -= 1
        self.prefix.settle()

    def finish(self, request: Request) -> None:
        """End a request, whatever it is doing; its pages go back as soon as no step in flight may write to them."""
        self.roster.remove(request)
        self.admission.withdraw(request)

    # ---------------------------------------------------------------------------------------------------- the plan

    def plan(self) -> StepPlan:
        """The next step, which is in flight from now on; empty exactly when there is none before what is in flight has
        been committed. While nothing is, there is one as long as there are requests."""
        must_land = self.roster.probation or self._probation_in_flight or self.admission.wants_preemption
        if self._num_in_flight and must_land:
            return StepPlan([])
        self.admission.wants_preemption = False
        self.ranking.begin_step()
        plan = self._next_plan()
        if plan.models:
            plan.dropped.extend(self.pictures.take_dropped())
            self._launch(plan)
        return plan

    def _next_plan(self) -> StepPlan:
        if self.roster.probation and not self._was_alone:
            plan = self._plan_alone()
            if plan.models:
                self._was_alone = True
                return plan
        plan = self._plan_together()
        self._was_alone = False
        if not plan.models and self.roster.probation:
            plan = self._plan_alone()
        return plan

    def _plan_alone(self) -> StepPlan:
        """A step for one request on probation: if it kills the process, it takes no other with it."""
        probation = self.roster.probation.values()
        request = min(probation, key=lambda r: (r.status is not Status.RUNNING, r.priority, r.arrival))
        if request.status is not Status.RUNNING and not self._admit(request):
            return StepPlan([])
        encodes: list[Encode] = []
        chunks: list[Chunk] = []
        budget = self._budget(self._max_step_tokens, beside_decodes=False)
        self._prefill(request, budget, chunks)
        if not chunks and self._vision_work.look(request, self._effort(beside_decodes=False), encodes)[0]:
            self._prefill(request, budget, chunks)
        return StepPlan([ModelPlan(request.model, chunks, encodes)] if chunks or encodes else [])

    def _plan_together(self) -> StepPlan:
        num_preemptions = self.num_preemptions
        decodes, growing, budget = self._plan_decodes()
        if growing:
            if self._num_in_flight and self.admission.is_short(growing):
                return StepPlan([])
            self.admission.grow(growing)
            if self.num_preemptions != num_preemptions:
                budget += sum([c.num_tokens for c in decodes if c.request.status is not Status.RUNNING])
        left = self._budget(budget, beside_decodes=bool(decodes))
        if self.roster.looking:
            left.reserve(self._effort(beside_decodes=bool(decodes)))
        prefills = self._plan_prefills(left, num_preemptions)
        if self.num_preemptions != num_preemptions:
            decodes = [chunk for chunk in decodes if chunk.request.status is Status.RUNNING]
        elif self._drafting is not None and decodes:
            num_left = self._max_step_tokens - sum([chunk.num_tokens for chunk in decodes + prefills])
            num_kept = math.inf if self.admission.shortfalls else self.num_running
            self._drafting.add(decodes, prefills, num_left=num_left, num_kept=num_kept)
        encodes = self._plan_encodes(left, prefills, beside_decodes=bool(decodes)) if self.roster.looking else []
        return self._by_model([*decodes, *prefills], encodes)

    def _launch(self, plan: StepPlan) -> None:
        """Count as done what `plan` will do."""
        self._num_in_flight += 1
        self.prefix.launch()
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
                        self.roster.await_end(request)

    # ----------------------------------------------------------------------------------------------------- decodes

    def _plan_decodes(self) -> tuple[list[Chunk], list[Request], int]:
        """The decodes of this step, those of them that lack pages, and the tokens left for prefills."""
        requests: Collection[Request] = self.roster.decoding.values()
        if self._num_in_flight and self._drafting is not None:
            requests = self._drafting.without_those_that_sit_out(requests)
        chunks, growing, budget = self._decode_chunks(requests)
        if len(chunks) < len(requests):  # the budget does not do for all
            chunks, growing, budget = self._decode_chunks(sorted(requests, key=self.ranking.rank))
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

    # ---------------------------------------------------------------------------------------------------- prefills

    def _budget(self, num_tokens: int, *, beside_decodes: bool) -> StepBudget:
        """For the prefills of a step that has so many tokens left."""
        if self._pace is None:
            return StepBudget(num_tokens)
        return StepBudget(num_tokens, self._pace.beside_decodes if beside_decodes else self._pace.alone)

    def _plan_prefills(self, budget: StepBudget, num_preemptions: int) -> list[Chunk]:
        """Spend the budget on those half done and those to be admitted, class by class. `num_preemptions` is what there
        had been when this step was begun."""
        chunks: list[Chunk] = []
        # After a famine nobody is admitted in the same step, and a request on probation that waits for room goes first.
        shortfalls = self.admission.shortfalls
        admissions = self.num_preemptions == num_preemptions and not any(h in shortfalls for h in self.roster.probation)
        for priority in self.ranking.classes():
            blocked = self._plan_class(priority, budget, chunks, admissions)
            if blocked and (priority is Priority.INTERACTIVE or self.ranking.batch_is_overdue):
                admissions = False
            if self.num_preemptions != num_preemptions:
                admissions = False  # what has just been preempted does not come back in the same step
        return chunks

    def _plan_class(self, priority: Priority, budget: StepBudget, chunks: list[Chunk], admissions: bool) -> bool:
        """Spend the budget on a class, the most deserving first.

        Returns whether a request is kept waiting for want of pages or of a place.
        """
        queues = self.ranking.queues[priority]
        blocked = False
        while budget and (request := queues.head()) is not None:
            if request.status is not Status.RUNNING and not (admissions and self._admit(request)):
                blocked = True
                break
            self._prefill(request, budget, chunks)
        if blocked and budget:
            half_done = [r for r in self.roster.prefilling.values() if r.priority is priority]
            for request in sorted(half_done, key=self.ranking.rank):
                if budget:
                    self._prefill(request, budget, chunks)
        return blocked

    def _admit(self, request: Request) -> bool:
        return self.admission.admit(request, num_in_flight=self._num_in_flight)

    def _prefill(self, request: Request, budget: StepBudget, chunks: list[Chunk]) -> None:
        """Append the request's next chunk, up to the first picture that is not encoded: none where that comes first."""
        start = request.num_computed_tokens
        num_clear = num_left = len(request.token_ids) - start
        if request.images:
            num_clear = self.pictures.num_clear(request, start, min(num_left, budget.tokens))
        num_tokens = budget.take(start, num_clear, self._span(request.model)) if num_clear else 0
        if num_tokens == num_clear < min(num_left, num_tokens + budget.tokens):
            self.roster.look(request)
        if num_tokens:
            chunks.append(self._prefill_chunk(request, start, num_tokens))

    def _prefill_chunk(self, request: Request, start: int, num_tokens: int) -> Chunk:
        end = start + num_tokens
        fresh = end - max(start, request.num_charged_tokens)
        if fresh > 0:
            request.num_charged_tokens = end
            self.ranking.charge(request, INPUT_COST * fresh)
        self.prefix.expect(request, start, end)
        self.ranking.queue(request).serve(request, cost_of(start, num_tokens, self._span(request.model)))
        is_last = end == len(request.token_ids)
        if is_last:
            self.roster.decode(request)
        else:
            self.roster.keep_prefilling(request)
        return Chunk(request, start, num_tokens, samples=is_last)

    def _span(self, model: int) -> float:
        return math.inf if self._pace is None else self._pace.spans[model]

    # ---------------------------------------------------------------------------------------------------- pictures

    def _effort(self, *, beside_decodes: bool) -> float:
        """What the vision towers' work of a step may cost, in tokens of the decoder."""
        if self._pace is None:
            return LOOKING_SHARE * self._max_step_tokens
        return LOOKING_SHARE * (self._pace.beside_decodes if beside_decodes else self._pace.alone)

    def _plan_encodes(self, budget: StepBudget, chunks: list[Chunk], *, beside_decodes: bool) -> list[Encode]:
        """Work on the pictures of all that look. Who has seen goes on with what is left of the step's tokens."""
        encodes: list[Encode] = []
        for request in self._vision_work.share(self._effort(beside_decodes=beside_decodes), encodes):
            for chunk in [chunk for chunk in chunks if chunk.request is request]:
                chunks.remove(chunk)  # a longer one takes its place
                budget.give_back(chunk.start, chunk.num_tokens, self._span(request.model))
            if budget:
                self._prefill(request, budget, chunks)
        return encodes

    def _by_model(self, chunks: Iterable[Chunk], encodes: Iterable[Encode]) -> StepPlan:
        plans = [ModelPlan(model, []) for model in range(len(self.tokens_per_page))]
        for chunk in chunks:
            plans[chunk.request.model].chunks.append(chunk)
        for encode in encodes:
            plans[encode.request.model].encodes.append(encode)
        return StepPlan([plan for plan in plans if plan.chunks or plan.encodes])
