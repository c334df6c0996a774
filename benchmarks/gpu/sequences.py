"""Runs requests on a runner without scheduler or processes: pages handed out here, steps alone or one ahead."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from aiexport_edge.engine.core.plan import PENDING_ID, Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import Priority, Sampling
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.core.step_sampler import PendingStep

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)


class Sequences:
    """Requests of a runner's first model. `logits` holds, by handle, those behind every id if the runner keeps them."""

    def __init__(self, runner: Runner, *, shuffled: bool = True) -> None:
        self.runner = runner
        self.logits: dict[int, list[torch.Tensor]] = {}
        self._free = list(range(1, runner.num_pages))
        if shuffled:
            random.Random(1).shuffle(self._free)
        self._handles = 0

    def add(self, token_ids: Sequence[int], *, computed: int = 0, sampling: Sampling = GREEDY) -> Request:
        """A request of this prompt. Its first `computed` tokens count as computed, whatever lies in their pages."""
        self._handles += 1
        self.logits[self._handles] = []
        request = Request(
            handle=self._handles,
            model=0,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            max_tokens=1 << 30,
            stop_ids=frozenset(),
            sampling=sampling,
            tenant="",
            weight=1.0,
            salt=b"",
            priority=Priority.INTERACTIVE,
            arrival=self._handles,
        )
        request.num_computed_tokens = computed
        self._grow(request, computed)
        return request

    def plan(self, requests: Sequence[Request], chunk: int = 1 << 30) -> StepPlan:
        """Compute at most `chunk` more tokens of each."""
        chunks = []
        for request in requests:
            start = request.num_computed_tokens
            count = min(chunk, request.num_tokens - start)
            self._grow(request, start + count)
            chunks.append(Chunk(request, start, count, samples=start + count == request.num_tokens))
        return StepPlan([ModelPlan(0, chunks)])

    def step(self, requests: Sequence[Request], chunk: int = 1 << 30) -> None:
        """One step, to its end."""
        plan = self.plan(requests, chunk)
        ids = self.runner.step(plan).ids
        for planned in plan.models[0].chunks:
            request = planned.request
            request.num_computed_tokens += planned.num_tokens
            if planned.samples:
                request.token_ids += ids[request.handle]
                if self.runner.keep_logits:
                    self.logits[request.handle].append(self.runner.last_logits[request.handle].cpu())

    def run(self, requests: Sequence[Request], num_tokens: int, chunk: int = 1 << 30) -> None:
        """Until each has so many output tokens."""
        while running := [request for request in requests if request.num_output_tokens < num_tokens]:
            self.step(running, chunk)

    def launch_ahead(self, requests: Sequence[Request], pending: PendingStep | None) -> PendingStep:
        """Launch a decode of all requests, then collect the one before it."""
        launched = self.runner.launch(self.plan(requests))
        if pending is not None:
            self.settle(requests, pending)
        self.advance(requests)
        return launched

    def advance(self, requests: Sequence[Request]) -> None:
        """Count what has been launched as computed, its ids as awaited."""
        for request in requests:
            request.num_computed_tokens = request.num_tokens
            request.token_ids.append(PENDING_ID)

    def settle(self, requests: Sequence[Request], pending: PendingStep) -> None:
        """Put a step's ids where they were awaited."""
        ids = self.runner.collect(pending).ids
        for request in requests:
            assert request.token_ids[-1] == PENDING_ID
            request.token_ids[-1] = ids[request.handle][0]

    def preempt(self, request: Request) -> None:
        """Take the pages away, and spoil them."""
        pages = self.runner.memory.bytes.view(self.runner.num_pages, -1)
        for page in request.pages:
            pages[page] = 0xFF
        self._free = request.pages + self._free
        request.pages = []
        request.num_computed_tokens = 0

    def end(self, request: Request) -> None:
        """Take its pages back."""
        self._free += request.pages
        request.pages = []

    def _grow(self, request: Request, num_tokens: int) -> None:
        while len(request.pages) * self.runner.tokens_per_page[0] < num_tokens:
            request.pages.append(self._free.pop())
