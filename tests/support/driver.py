"""Drives a runner with step plans made by hand: pages per request, chunked prefill, prefix reuse, preemption."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from aiexport_edge.engine.core.loading import load
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel, Priority, Sampling
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.runner import Runner

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)


def load_runner(
    *directories: Path | str,
    dtype: str = "float32",
    deterministic: bool = False,
    page_bytes: int = 0,
    pool_bytes: int = 256 << 20,
    max_num_running: int = 64,
    drafts: bool = False,
) -> Runner:
    """A runner over `directories` on one CPU thread, which keeps its logits."""
    models = [CoreModel(f"model-{i}", str(path), dtype, 0, deterministic, "") for i, path in enumerate(directories)]
    config = CoreConfig(models, "cpu", page_bytes, pool_bytes, max_num_running, 512, 1, 0.0, drafts=drafts)
    return load(config, lambda model, done, total: None, keep_logits=True)


@dataclass
class Driver:
    """Requests on a runner. Pages are handed out in random order, and poisoned with NaN when they come back."""

    runner: Runner
    random: random.Random = field(default_factory=lambda: random.Random(5))
    logits: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free = list(range(1, self.runner.num_pages))
        self.random.shuffle(self.free)
        self.handles = 0

    def add(self, prompt: Sequence[int], *, model: int = 0, sampling: Sampling = GREEDY) -> Request:
        """A request that nothing is computed of yet."""
        self.handles += 1
        self.logits[self.handles] = []
        return Request(
            handle=self.handles,
            model=model,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            max_tokens=1 << 30,
            stop_ids=frozenset(),
            sampling=sampling,
            tenant="",
            weight=1.0,
            salt=b"",
            priority=Priority.INTERACTIVE,
            arrival=self.handles,
        )

    def step(self, requests: Sequence[Request], chunk: int = 512) -> None:
        """One step: at most `chunk` tokens of each request."""
        plans: dict[int, list[Chunk]] = {}
        for request in requests:
            count = min(chunk, request.num_tokens - request.num_computed_tokens)
            end = request.num_computed_tokens + count
            while len(request.pages) * self.runner.tokens_per_page[request.model] < end:
                request.pages.append(self.free.pop())
            plans.setdefault(request.model, []).append(
                Chunk(request, request.num_computed_tokens, count, samples=end == request.num_tokens)
            )
        result = self.runner.step(StepPlan([ModelPlan(model, chunks) for model, chunks in plans.items()]))
        for chunks in plans.values():
            for planned in chunks:
                request = planned.request
                request.num_computed_tokens += planned.num_tokens
                assert planned.samples == (request.handle in result.ids)
                if planned.samples:
                    request.token_ids += result.ids[request.handle]
                    self.logits[request.handle].append(self.runner.last_logits[request.handle].clone())

    def run(self, requests: Sequence[Request], num_tokens: int, chunk: int = 512) -> None:
        """Step until each request has `num_tokens` output tokens."""
        while running := [request for request in requests if request.num_output_tokens < num_tokens]:
            self.step(running, chunk)

    def share(self, source: Request, target: Request) -> int:
        """Let `target`, of the same prompt, begin with `source`'s full pages; how many tokens those hold."""
        tokens_per_page = self.runner.tokens_per_page[source.model]
        pages = (target.num_tokens - 1) // tokens_per_page
        target.pages = source.pages[:pages]
        target.num_computed_tokens = pages * tokens_per_page
        return target.num_computed_tokens

    def preempt(self, request: Request) -> None:
        """Take all pages from `request`: it is to be computed again, in others."""
        memory = self.runner.memory
        for page in request.pages:
            first = page * memory.shape.page_bytes
            memory.bytes[first : first + memory.shape.page_bytes] = 0xFF  # NaN in float32 and in bfloat16
        self.free = request.pages + self.free  # taken last
        request.pages = []
        request.num_computed_tokens = 0

    def outcome(self, request: Request) -> tuple[list[int], torch.Tensor]:
        """Its output ids and the logits behind them."""
        return request.token_ids[request.num_prompt_tokens :], torch.stack(self.logits[request.handle])
