"""A core without a device: the real scheduler, page pool and commit around a runner that models what pages hold.

The runner draws ids by a pure function of the ids before them, so that what a request must answer is known beforehand.
It notes for every (page, offset) which sequence of ids, of which model and salt, its keys and values stand for, and
asserts before each draw that attention would read exactly its own prefix: a page shared by mistake, a stale prefix hit
or another tenant's shows there. So does a picture: its digest is part of what its tokens stand for, and they are
computed when every unit of its encoding has been. Where steps overlap, a launched step reads and writes as late as it
can: when it is collected.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from aiexport_edge.engine.core.commit import end_of
from aiexport_edge.engine.core.drafts import DraftCost
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pictures import Eyes, Key, Pictures, key_of
from aiexport_edge.engine.core.pipeline import Pipeline
from aiexport_edge.engine.core.plan import PENDING_ID, Chunk, Encode, StepPlan, StepResult
from aiexport_edge.engine.core.prefill_pace import PrefillPace
from aiexport_edge.engine.core.protocol import (
    AdapterRoom,
    AddRequest,
    FinishReason,
    ImageInput,
    Priority,
    Sampling,
    StepReport,
    pack_ids,
)
from aiexport_edge.engine.core.request import Request, Status, make_request
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.suspects import Suspects

STOP_ID = 7
NUM_IDS = 40  # a draw is STOP_ID once in 40 times


def next_id(model: int, ids: list[int]) -> int:
    """The id that follows `ids`."""
    digest = blake2b(bytes([model]) + pack_ids(ids), digest_size=8).digest()
    return int.from_bytes(digest, "little") % NUM_IDS


def allowed_ids(output: Sequence[int]) -> list[int]:
    """What a `FakeConstraint` allows after `output`: half of all ids, or a stop."""
    digest = blake2b(pack_ids(list(output)), digest_size=NUM_IDS).digest()
    return [i for i in range(NUM_IDS) if digest[i] < 128 or i == STOP_ID]


@dataclass(frozen=True)
class FakeTaken:
    """What was drawn."""

    ids: list[int]
    over: bool = False
    cut: bool = False


class FakeConstraint:
    """Allows what `allowed_ids` says of the output that it was told of."""

    def __init__(self, forced: Sequence[int]) -> None:
        self.output = list(forced)

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        bits = np.zeros(32 * len(row), dtype=np.uint8)
        bits[allowed_ids(self.output)] = 1
        row[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def fill_ahead(self, rows: npt.NDArray[np.int32], draft: Sequence[int]) -> int:
        self.fill(rows[0])
        for number, id_ in enumerate(draft, 1):
            if id_ not in allowed_ids([*self.output, *draft[: number - 1]]):
                rows[number:] = -1
                return number
            FakeConstraint([*self.output, *draft[:number]]).fill(rows[number])
        return len(rows)

    def forced_ids(self) -> list[int]:
        return []

    def advance(self, drawn: Sequence[int]) -> FakeTaken:
        assert all(i in allowed_ids(self.output + list(drawn[:n])) for n, i in enumerate(drawn))
        self.output += drawn
        return FakeTaken(list(drawn))


def draw_id(model: int, ids: list[int], allowed: Sequence[int] | None) -> int:
    """The id that follows `ids`: the first allowed one from `next_id` on."""
    first = next_id(model, ids)
    return first if allowed is None else min(allowed, key=lambda i: (i - first) % NUM_IDS)


def undisturbed(message: AddRequest, *, constrained: bool = False) -> tuple[list[int], FinishReason]:
    """The whole output of a request on a runner of its own, and why it ends."""
    ids = list(memoryview(message.prompt_ids).cast("I"))
    output: list[int] = []
    while len(output) < message.max_tokens:
        output.append(draw_id(message.model, ids + output, allowed_ids(output) if constrained else None))
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
    images: Sequence[ImageInput] = (),
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
        images=list(images),
    )


@dataclass(eq=False)
class Piece:
    """A chunk as the device got it: what later becomes of the request does not reach it."""

    chunk: Chunk
    ids: list[int]  # up to the chunk's end, guesses included; the last may be on its way
    pages: list[int]
    allowed: list[list[int]] | None = None  # for the own token and after each guess, as far as is known

    @property
    def request(self) -> Request:
        return self.chunk.request

    def written(self, size: int) -> set[int]:
        """The pages that it writes to."""
        return {self.pages[position // size] for position in range(self.chunk.start, self.chunk.end)}


@dataclass(eq=False)
class FakeStep:
    """A step that has been launched."""

    pieces: list[Piece]
    encodes: list[Encode] = field(default_factory=list)

    @property
    def requests(self) -> set[Request]:
        """Who is in it."""
        return {piece.request for piece in self.pieces} | {encode.request for encode in self.encodes}


class FakeRunner:
    """`num_drawn` counts ids by handle, those drawn in vain too, but for those behind a wrong guess."""

    def __init__(
        self,
        *,
        num_pages: int,
        tokens_per_page: list[int],
        pool: PagePool | None = None,
        overlaps: bool = False,
        eyes: Sequence[Eyes | None] | None = None,
    ) -> None:
        self.eyes = list(eyes or [None] * len(tokens_per_page))
        self.picture_bytes = 0
        self.encoded: Counter[Key] = Counter()  # units done of pictures that have not been dropped
        self.num_encoded: Counter[Key] = Counter()  # pictures begun
        self.num_pages = num_pages
        self.page_bytes = 64
        self.max_step_tokens = 1 << 30
        self.tokens_per_page = tokens_per_page
        self.weight_bytes = [0] * len(tokens_per_page)
        self.pace = None
        self.draft_cost = None
        self.adapter_room = AdapterRoom()
        self.overlaps = overlaps
        self.in_flight: list[FakeStep] = []
        self.num_drawn: Counter[int] = Counter()
        self.memory: dict[tuple[int, int], tuple[int, bytes, bytes]] = {}
        self._pool = pool
        self._slots: dict[int, int] = {}  # the last id drawn, by handle
        self._prefixes: dict[int, tuple[list[int], list[bytes]]] = {}  # by handle: ids, and a hash of each prefix

    def launch(self, plan: StepPlan) -> FakeStep:
        assert plan.models
        assert len(self.in_flight) <= int(self.overlaps)
        assert all(p.allowed is not None for s in self.in_flight for p in s.pieces if _is_constrained(p)), "undrawn"
        for key in plan.dropped:
            assert self.encoded.pop(key), "it was never begun"
        pieces = []
        for model_plan in plan.models:
            assert model_plan.chunks or model_plan.encodes
            for encode in model_plan.encodes:
                self._encode(encode)
            for chunk in model_plan.chunks:
                assert chunk.request.model == model_plan.model
                pieces.append(self._piece(chunk))
        written: set[int] = set()
        for piece in pieces:
            pages = piece.written(self.tokens_per_page[piece.request.model])
            assert written.isdisjoint(pages), "two requests write to one page"
            written |= pages
        for piece in (piece for step in self.in_flight for piece in step.pieces):
            for later in pieces:
                if later.request is not piece.request:
                    pages = later.written(self.tokens_per_page[later.request.model])
                    assert pages.isdisjoint(piece.pages), "a step in flight still uses the page"
        self.in_flight.append(FakeStep(pieces, [encode for model in plan.models for encode in model.encodes]))
        return self.in_flight[-1]

    def draw(self, launched: FakeStep) -> None:
        assert launched is self.in_flight[-1]
        for piece in filter(_is_constrained, launched.pieces):
            if piece.request.status is Status.FINISHED:
                piece.allowed = [list(range(NUM_IDS))]
                continue
            draft, end = piece.chunk.draft, piece.chunk.own_end
            assert PENDING_ID not in piece.request.token_ids[:end], "drawn before its prefix is known"
            masks = np.zeros((1 + len(draft), -(-NUM_IDS // 32)), dtype=np.int32)
            assert piece.request.constraint is not None
            count = piece.request.constraint.fill_ahead(masks, draft)
            bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
            piece.allowed = [list(np.flatnonzero(row)) for row in bits[:count]]

    def collect(self, launched: FakeStep) -> StepResult:
        assert launched is self.in_flight.pop(0), "collected in the order of launches"
        for piece in launched.pieces:
            if piece.ids[-1] == PENDING_ID:
                piece.ids[-1] = self._slots[piece.request.handle]
            self._write(piece)
        ids: dict[int, list[int]] = {}
        for piece in launched.pieces:
            self._read(piece)
            if piece.chunk.samples:
                ids[piece.request.handle] = drawn = self._draw(piece)
                known, prefixes = self._prefixes[piece.request.handle]
                for id_ in drawn[: len(piece.chunk.draft)]:
                    if id_ == piece.ids[len(known)]:  # a guess that came true
                        prefixes.append(_chained(prefixes[-1], id_))
                        known.append(id_)
        for handle, drawn in ids.items():
            self._slots[handle] = drawn[-1]
            self.num_drawn[handle] += len(drawn)
        return StepResult(ids)

    def _encode(self, encode: Encode) -> None:
        assert encode.num_units >= 1
        assert encode.request.status is Status.RUNNING
        assert encode.key == key_of(encode.request, encode.index)
        self.num_encoded[encode.key] += encode.key not in self.encoded
        self.encoded[encode.key] += encode.num_units
        assert self.encoded[encode.key] <= self._num_units(encode.key)

    def _num_units(self, key: Key) -> int:
        eyes = self.eyes[key[0]]
        assert eyes is not None
        return eyes.cost((key[3], key[4]))[0]

    def _piece(self, chunk: Chunk) -> Piece:
        for index, span in enumerate(chunk.request.spans):
            if span.start < chunk.end and chunk.start < span.end:
                key = key_of(chunk.request, index)
                assert self.encoded[key] == self._num_units(key), "a token of a picture that is not encoded"
        return self._check_piece(chunk)

    def _check_piece(self, chunk: Chunk) -> Piece:
        request, size = chunk.request, self.tokens_per_page[chunk.request.model]
        assert request.status is Status.RUNNING
        assert chunk.num_tokens >= 1
        end = chunk.own_end
        assert end == request.num_computed_tokens
        assert chunk.samples == (end == len(request.token_ids) - 1 and request.token_ids[-1] == PENDING_ID)
        assert chunk.samples or end < len(request.token_ids)
        assert len(request.pages) * size >= chunk.end, "pages cover every position"
        ids = request.token_ids[:end]
        if PENDING_ID in ids:
            assert ids.index(PENDING_ID) == end - 1 == chunk.start, "only a decode's input may be on its way"
            assert any(request is p.request and p.chunk.samples for p in self.in_flight[-1].pieces)
        if chunk.draft:
            assert chunk.samples
            assert chunk.start == end - 1
            assert PENDING_ID not in ids, "guesses come after ids that are known"
            assert not any(request is p.request for step in self.in_flight for p in step.pieces)
            assert chunk.output_index + len(chunk.draft) < request.max_tokens, "guesses for what is past the budget"
        assert not any(request is p.request and p.chunk.draft for step in self.in_flight for p in step.pieces)
        return Piece(chunk, ids + list(chunk.draft), list(request.pages))

    def _write(self, piece: Piece) -> None:
        request, size = piece.request, self.tokens_per_page[piece.request.model]
        if self._pool is not None:
            for page in piece.written(size):
                assert page != 0
                assert page in request.pages, "writes to a page that it has given back"
                assert self._pool._refs[page] == 1, "writes to a page that others hold"
                assert self._pool._hashes[page] is None, "writes to a page that others may find"
        prefixes = self._prefixes_of(piece)
        for position in range(piece.chunk.start, piece.chunk.end):
            content = (request.model, request.salt, prefixes[position])
            self.memory[piece.pages[position // size], position % size] = content

    def _read(self, piece: Piece) -> None:
        request, size = piece.request, self.tokens_per_page[piece.request.model]
        prefixes = self._prefixes_of(piece)
        for position in range(piece.chunk.end):
            content = self.memory[piece.pages[position // size], position % size]
            assert content == (request.model, request.salt, prefixes[position]), "reads what is not its own prefix"

    def _draw(self, piece: Piece) -> list[int]:
        drawn: list[int] = []
        for number, guess in enumerate([*piece.chunk.draft, None]):
            allowed = None if piece.allowed is None else piece.allowed[number]
            drawn.append(draw_id(piece.request.model, piece.ids[: piece.chunk.own_end] + drawn, allowed))
            if drawn[-1] != guess or (piece.allowed is not None and number + 1 == len(piece.allowed)):
                break
        return drawn

    def _prefixes_of(self, piece: Piece) -> list[bytes]:
        ids, prefixes = self._prefixes.setdefault(piece.request.handle, ([], []))
        own = piece.ids[: piece.chunk.own_end]
        assert own[: len(ids)] == ids[: len(own)], "what was computed stays"
        of_picture = {
            position: image.digest
            for image, span in zip(piece.request.images, piece.request.spans, strict=True)
            for position in range(span.start, span.end)
        }
        for id_ in own[len(ids) :]:
            parent = (prefixes[-1] if prefixes else b"") + of_picture.get(len(prefixes), b"")
            prefixes.append(_chained(parent, id_))
            ids.append(id_)
        if not piece.chunk.draft:
            return prefixes
        guessed = prefixes[: len(own)]
        for id_ in piece.chunk.draft:
            guessed.append(_chained(guessed[-1], id_))
        return guessed


def _chained(parent: bytes, id_: int) -> bytes:
    return blake2b(parent + pack_ids([id_]), digest_size=16).digest()


def _is_constrained(piece: Piece) -> bool:
    return piece.chunk.samples and piece.request.constraint is not None


class FakeDrafter:
    """Knows what comes next, and says it at the given rate."""

    def __init__(self, request: Request, rate: float) -> None:
        self._request = request
        self._rate = rate
        self._rng = random.Random(request.handle)
        self.chance = 1.0

    @property
    def is_worth_sitting_out(self) -> bool:
        return self._rng.random() < 0.7

    def look(self, num_ids: int) -> None:
        assert PENDING_ID not in self._request.token_ids[:num_ids]

    def guesses(self, most: int) -> tuple[int, ...]:
        ids, model = list(self._request.token_ids), self._request.model
        num_prompt, first = self._request.num_prompt_tokens, len(ids)
        for _ in range(most):
            allowed = None if self._request.constraint is None else allowed_ids(ids[num_prompt:])
            right = self._rng.random() < self._rate
            ids.append(draw_id(model, ids, allowed) if right else self._rng.randrange(NUM_IDS))
        return tuple(ids[first:])


class FakeSuspects(Suspects):
    """Those named last, in this process alone."""

    def __init__(self) -> None:
        self.handles: list[int] = []

    def write(self, handles: list[int]) -> None:
        assert len(set(handles)) == len(handles)
        self.handles = handles


@dataclass
class Reply:
    """What the parent has heard about a request."""

    message: AddRequest
    constrained: bool = False
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
    """Steps a scheduler with a `FakeRunner`, checks the books after each step, and listens like a parent.

    With a `guess_rate`, requests are drafted for wherever there is room, and this share of guesses is right. `plan` is
    the plan that was launched last.
    """

    def __init__(
        self,
        *,
        num_pages: int = 33,
        tokens_per_page: list[int] | None = None,
        revisions: list[str] | None = None,
        max_num_running: int = 8,
        max_step_tokens: int = 16,
        batch_floor_share: float = 0.1,
        guess_rate: float | None = None,
        overlaps: bool = False,
        pace: PrefillPace | None = None,
        eyes: Sequence[Eyes | None] | None = None,
        picture_bytes: int = 0,
    ) -> None:
        tokens_per_page = tokens_per_page or [4]
        self.pictures = None if eyes is None else Pictures(eyes, capacity_bytes=picture_bytes)
        self.pool = PagePool(num_pages)
        self.scheduler = Scheduler(
            self.pool,
            revisions=revisions or [f"revision-{model}" for model in range(len(tokens_per_page))],
            tokens_per_page=tokens_per_page,
            max_num_running=max_num_running,
            max_step_tokens=max_step_tokens,
            batch_floor_share=batch_floor_share,
            pace=pace,
            pictures=self.pictures,
            draft_cost=None if guess_rate is None else DraftCost(math.inf, (math.inf,) * len(tokens_per_page), 64),
        )
        self._guess_rate = guess_rate
        self.runner = _CheckedRunner(
            self,
            num_pages=num_pages,
            tokens_per_page=tokens_per_page,
            pool=self.pool,
            overlaps=overlaps,
            eyes=eyes,
        )
        self.suspects = FakeSuspects()
        self.pipeline = Pipeline(scheduler=self.scheduler, runner=self.runner, suspects=self.suspects)
        self.replies: dict[int, Reply] = {}
        self.num_steps = 0
        self.plan = StepPlan([])
        self._max_num_running = max_num_running
        self._max_step_tokens = max_step_tokens

    def add(self, message: AddRequest, *, constrained: bool = False) -> Request:
        """Queue a request, or end it at once when its forced ids have ended it."""
        merge_size = self.scheduler.pictures.merge_size(message.model) if message.images else 1
        request = make_request(message, arrival=len(self.replies), merge_size=merge_size)
        reply = self.replies[message.handle] = Reply(message, constrained)
        if constrained:
            request.constraint = FakeConstraint(reply.output)
        reason = end_of(request)
        if reason is None:
            self.scheduler.add(request)
            if self._guess_rate is not None:
                request.drafter = FakeDrafter(request, self._guess_rate)  # type: ignore[assignment]
        else:
            reply.reason = reason
        return request

    def abort(self, handle: int) -> None:
        """What the loop does for an `AbortRequest`."""
        request = self.scheduler.requests.get(handle)
        if request is not None:
            self.scheduler.finish(request)
            self.replies[handle].reason = FinishReason.ABORTED
            assert bool(request.pages) == bool(request.num_in_flight)
        self.pool.check()

    def step(self) -> StepReport:
        """One step with every check there is. Where steps overlap, what it reports is the one before."""
        report = self.pipeline.advance() or StepReport([], [], [])
        self.num_steps += 1
        self._hear(report)
        self.pool.check()
        self.scheduler.pictures.check()
        self.scheduler.roster.check()
        in_flight = {request for step in self.runner.in_flight for request in step.requests}
        assert set(self.suspects.handles) == {request.handle for request in in_flight}
        held = {page for request in {*self.scheduler.requests.values(), *in_flight} for page in request.pages}
        assert len(held) == self.pool.num_used, "every used page is in some request's hands"
        return report

    def check_plan(self, plan: StepPlan) -> None:
        """What holds of every plan, when it is launched."""
        self.plan = plan
        chunks = [chunk for model in plan.models for chunk in model.chunks]
        handles = [chunk.request.handle for chunk in chunks]
        in_flight = [request for step in self.runner.in_flight for request in step.requests]
        encoding = {encode.request for model in plan.models for encode in model.encodes}
        assert len(set(handles)) == len(handles) <= self._max_num_running
        assert sum(model.num_tokens for model in plan.models) <= self._max_step_tokens
        assert self.scheduler.num_running <= self._max_num_running
        assert set(self.suspects.handles) == {*handles, *(request.handle for request in [*in_flight, *encoding])}
        if any(request.probation for request in {*encoding, *(chunk.request for chunk in chunks)}):
            assert len({*encoding, *(chunk.request for chunk in chunks)}) == 1, "on probation, so alone"
            assert not in_flight, "on probation, so alone"
        assert not any(request.probation for request in in_flight), "one on probation runs alone"
        self.pool.check()
        for handle in handles:
            self.replies[handle].steps += 1

    def run(self, max_steps: int = 100_000) -> None:
        """Until nothing is left, which must take at most `max_steps`."""
        for _ in range(max_steps):
            if not self.pipeline.busy:
                break
            self.step()
        assert not self.scheduler.requests, f"not finished after {max_steps} steps"
        assert self.pool.num_used == 0
        assert not self.suspects.handles

    def check_outputs(self) -> None:
        """Every request that was not aborted has answered what it would have undisturbed; the others a part of it."""
        for reply in self.replies.values():
            output, reason = undisturbed(reply.message, constrained=reply.constrained)
            if reply.reason is FinishReason.ABORTED:
                assert reply.output == output[: len(reply.output)]
            else:
                assert (reply.output, reply.reason) == (output, reason)

    def _hear(self, report: StepReport) -> None:
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


class _CheckedRunner(FakeRunner):
    """Lets its core look at what is launched."""

    def __init__(self, core: FakeCore, **options: Any) -> None:
        super().__init__(**options)
        self._core = core

    def launch(self, plan: StepPlan) -> FakeStep:
        self._core.check_plan(plan)
        return super().launch(plan)


def prompt_of(rng: random.Random, num_tokens: int) -> list[int]:
    """A random prompt that holds no stop id."""
    return [rng.choice([i for i in range(NUM_IDS) if i != STOP_ID]) for _ in range(num_tokens)]
