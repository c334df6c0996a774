"""A core without a device: the real scheduler, page pool and commit around a runner that models what pages hold.

The runner draws ids by a pure function of the ids before them, so that what a request must answer is known beforehand.
It notes for every (page, offset) which sequence of ids, of which model and salt, its keys and values stand for, and
asserts before each draw that attention would read exactly its own prefix: a page shared by mistake, a stale prefix hit
or another tenant's shows there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b

from aiexport_edge.engine.core.commit import commit, end_of
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.plan import Chunk, StepPlan, StepResult
from aiexport_edge.engine.core.protocol import AddRequest, FinishReason, Priority, Sampling, StepReport, pack_ids
from aiexport_edge.engine.core.request import Request, Status, make_request
from aiexport_edge.engine.core.scheduler import Scheduler

STOP_ID = 7
NUM_IDS = 40  # a draw is STOP_ID once in 40 times


def next_id(model: int, ids: list[int]) -> int:
    """The id that follows `ids`."""
    digest = blake2b(bytes([model]) + pack_ids(ids), digest_size=8).digest()
    return int.from_bytes(digest, "little") % NUM_IDS


def undisturbed(message: AddRequest) -> tuple[list[int], FinishReason]:
    """The whole output of a request on a runner of its own, and why it ends."""
    ids = list(memoryview(message.prompt_ids).cast("I"))
    output: list[int] = []
    while len(output) < message.max_tokens:
        output.append(next_id(message.model, ids + output))
        if output[-1] in message.stop_ids:
            return output, FinishReason.END_TURN
    return output, FinishReason.MAX_TOKENS


def add_request(
    handle: int,
    prompt: list[int],
    *,
    model: int = 0,
    output: list[int] | None = None,
    max_tokens: int = 8,
    stop_ids: list[int] | None = None,
    tenant: str = "tenant",
    weight: float = 1.0,
    salt: bytes = b"",
    priority: Priority = Priority.INTERACTIVE,
    probation: bool = False,
) -> AddRequest:
    """An `AddRequest` with the usual values for what does not matter to a test."""
    return AddRequest(
        handle=handle,
        model=model,
        prompt_ids=pack_ids(prompt),
        output_ids=pack_ids(output or []),
        max_tokens=max_tokens,
        stop_ids=stop_ids or [],
        sampling=Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0),
        tenant=tenant,
        weight=weight,
        salt=salt,
        priority=priority,
        probation=probation,
    )


class FakeRunner:
    """`ids_per_step` is how many ids a draw brings, a function of (handle, output index); overshoot included."""

    def __init__(
        self,
        *,
        num_pages: int,
        tokens_per_page: list[int],
        pool: PagePool | None = None,
        ids_per_step: Callable[[int, int], int] = lambda handle, index: 1,
    ) -> None:
        self.num_pages = num_pages
        self.page_bytes = 64
        self.tokens_per_page = tokens_per_page
        self.weight_bytes = [0] * len(tokens_per_page)
        self._pool = pool
        self._ids_per_step = ids_per_step
        self._memory: dict[tuple[int, int], tuple[int, bytes, bytes]] = {}
        self._prefixes: dict[int, list[bytes]] = {}  # by handle: hash of token_ids[: i + 1], for the i computed so far

    def step(self, plan: StepPlan) -> StepResult:
        ids: dict[int, list[int]] = {}
        written: set[int] = set()
        for model_plan in plan.models:
            assert model_plan.chunks
            for chunk in model_plan.chunks:
                assert chunk.request.model == model_plan.model
                pages = self._write(chunk)
                assert written.isdisjoint(pages), "two requests write to one page"
                written.update(pages)
        for model_plan in plan.models:
            for chunk in model_plan.chunks:
                self._read(chunk)
                if chunk.samples:
                    ids[chunk.request.handle] = self._draw(chunk.request)
        return StepResult(ids)

    def _write(self, chunk: Chunk) -> set[int]:
        request, size = chunk.request, self.tokens_per_page[chunk.request.model]
        end = chunk.start + chunk.num_tokens
        assert request.status is Status.RUNNING
        assert chunk.num_tokens >= 1
        assert chunk.start == request.num_computed_tokens
        assert end <= len(request.token_ids)
        assert chunk.samples == (end == len(request.token_ids))
        assert len(request.pages) * size >= end, "pages cover every position"
        pages = {request.pages[position // size] for position in range(chunk.start, end)}
        if self._pool is not None:
            for page in pages:
                assert page != 0
                assert self._pool._refs[page] == 1, "writes to a page that others hold"
                assert self._pool._hashes[page] is None, "writes to a page that others may find"
        prefixes = self._prefixes_of(request, end)
        for position in range(chunk.start, end):
            content = (request.model, request.salt, prefixes[position])
            self._memory[request.pages[position // size], position % size] = content
        return pages

    def _read(self, chunk: Chunk) -> None:
        request, size = chunk.request, self.tokens_per_page[chunk.request.model]
        prefixes = self._prefixes_of(request, chunk.start + chunk.num_tokens)
        for position in range(chunk.start + chunk.num_tokens):
            content = self._memory[request.pages[position // size], position % size]
            assert content == (request.model, request.salt, prefixes[position]), "reads what is not its own prefix"

    def _draw(self, request: Request) -> list[int]:
        drawn: list[int] = []
        for _ in range(self._ids_per_step(request.handle, request.num_output_tokens)):
            drawn.append(next_id(request.model, request.token_ids + drawn))
        return drawn

    def _prefixes_of(self, request: Request, num_tokens: int) -> list[bytes]:
        prefixes = self._prefixes.setdefault(request.handle, [])
        while len(prefixes) < num_tokens:
            parent = prefixes[-1] if prefixes else b""
            prefixes.append(blake2b(parent + pack_ids([request.token_ids[len(prefixes)]]), digest_size=16).digest())
        return prefixes


@dataclass
class Reply:
    """What the parent has heard about a request."""

    message: AddRequest
    started: bool = False
    cached_tokens: int = 0
    ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    steps: int = 0  # that it was in

    @property
    def output(self) -> list[int]:
        """Everything it has answered, what earlier attempts had included."""
        return [*memoryview(self.message.output_ids).cast("I"), *self.ids]


class FakeCore:
    """Steps a scheduler with a `FakeRunner`, checks the books after each step, and listens like a parent."""

    def __init__(
        self,
        *,
        num_pages: int = 33,
        tokens_per_page: list[int] | None = None,
        revisions: list[str] | None = None,
        max_num_running: int = 8,
        max_step_tokens: int = 16,
        batch_floor_share: float = 0.1,
        ids_per_step: Callable[[int, int], int] = lambda handle, index: 1,
    ) -> None:
        tokens_per_page = tokens_per_page or [4]
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(
            self.pool,
            revisions=revisions or [f"revision-{model}" for model in range(len(tokens_per_page))],
            tokens_per_page=tokens_per_page,
            max_num_running=max_num_running,
            max_step_tokens=max_step_tokens,
            batch_floor_share=batch_floor_share,
        )
        self.runner = FakeRunner(
            num_pages=num_pages, tokens_per_page=tokens_per_page, pool=self.pool, ids_per_step=ids_per_step
        )
        self.replies: dict[int, Reply] = {}
        self.num_steps = 0
        self.plan = StepPlan([])
        self._max_num_running = max_num_running
        self._max_step_tokens = max_step_tokens

    def add(self, message: AddRequest) -> Request:
        """Queue a request, or end it at once when its forced ids have ended it."""
        request = make_request(message, arrival=len(self.replies))
        reply = self.replies[message.handle] = Reply(message)
        reason = end_of(request)
        if reason is None:
            self.scheduler.add(request)
        else:
            reply.reason = reason
        return request

    def abort(self, handle: int) -> None:
        """What the loop does for an `AbortRequest`."""
        request = self.scheduler.requests.get(handle)
        if request is not None:
            self.scheduler.finish(request)
            self.replies[handle].reason = FinishReason.ABORTED
            assert not request.pages
        self.pool.check()

    def step(self) -> StepReport:
        """One step with every check there is."""
        plan = self.plan = self.scheduler.plan()
        assert plan.models, "there are requests, but none can run"
        chunks = [chunk for model in plan.models for chunk in model.chunks]
        handles = [chunk.request.handle for chunk in chunks]
        assert len(set(handles)) == len(handles) <= self._max_num_running
        assert sum(model.num_tokens for model in plan.models) <= self._max_step_tokens
        assert self.scheduler.num_running <= self._max_num_running
        if any(chunk.request.probation for chunk in chunks):
            assert len(chunks) == 1, "on probation, so alone"
        self.pool.check()
        report = commit(self.scheduler, plan, self.runner.step(plan))
        self.num_steps += 1
        self._hear(report, handles)
        self.pool.check()
        held = {page for request in self.scheduler.requests.values() for page in request.pages}
        assert len(held) == self.pool.num_used, "every used page is in some request's hands"
        return report

    def run(self, max_steps: int = 100_000) -> None:
        """Until nothing is left, which must take at most `max_steps`."""
        for _ in range(max_steps):
            if not self.scheduler.requests:
                break
            self.step()
        assert not self.scheduler.requests, f"not finished after {max_steps} steps"
        assert self.pool.num_used == 0

    def check_outputs(self) -> None:
        """Every request that was not aborted has answered what it would have undisturbed; the others a part of it."""
        for reply in self.replies.values():
            output, reason = undisturbed(reply.message)
            if reply.reason is FinishReason.ABORTED:
                assert reply.output == output[: len(reply.output)]
            else:
                assert (reply.output, reply.reason) == (output, reason)

    def _hear(self, report: StepReport, handles: list[int]) -> None:
        for handle in handles:
            self.replies[handle].steps += 1
        for started in report.started:
            reply = self.replies[started.handle]
            assert not reply.started
            reply.started = True
            reply.cached_tokens = started.cached_tokens
        for tokens in report.tokens:
            reply = self.replies[tokens.handle]
            assert reply.started
            assert reply.reason is None
            assert tokens.ids
            reply.ids += tokens.ids
        for finished in report.finished:
            reply = self.replies[finished.handle]
            assert reply.reason is None
            reply.reason = FinishReason(finished.reason)


def prompt_of(rng: random.Random, num_tokens: int) -> list[int]:
    """A random prompt that holds no stop id."""
    return [rng.choice([i for i in range(NUM_IDS) if i != STOP_ID]) for _ in range(num_tokens)]
