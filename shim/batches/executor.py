"""Executes batches in this process: leases requests, has the engines answer them, writes what came of them.

Any number of processes do this on one store; the leases (`store/batch_leases.py`) keep two from counting the same work.
Answers are written together, as many as have come since the last commit. Knows nothing of HTTP.

    store ──lease──▶ [ held: waiting at an engine, or running ] ──answers──▶ store
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.shim import metrics
from aiexport_edge.shim.batches.pace import Pace
from aiexport_edge.shim.batches.run import NoQuota, Runner, errored
from aiexport_edge.shim.catalog import Catalog
from aiexport_edge.shim.engines.engines import Engines, ModelState
from aiexport_edge.shim.errors import ApiError, internal_error
from aiexport_edge.shim.limits.limits import Reservation
from aiexport_edge.shim.recurring import forever
from aiexport_edge.shim.store.batch_leases import BatchLeases, Waiting
from aiexport_edge.shim.store.batch_values import Answer, Leased
from aiexport_edge.shim.store.errors import remedy

T = TypeVar("T")

HELD_BYTES = 32 << 20  # of bodies that are held at one time
_LOOK_S = 0.5  # for work that another process has accepted, and for cancellations
_GROUP_S = 0.02  # what comes together is leased, and written, together
_SWEEP_S = 2.0
_FORGET_S = 60.0
_QUOTA_LOOK_S = 2.0  # between looks at a spent quota, which the operator may raise at any time

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Held:
    """A request that this process has leased. `stop_as` is set where it is to end without a result."""

    leased: Leased
    weights: str
    waiting: bool = True  # no engine has begun it
    stop_as: str | None = None
    reservation: Reservation | None = None  # of the day's tokens, until the answer is written
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class Executor:
    """Owns the leases of this process. `run` for as long as it is used; `wake` when there is new work."""

    def __init__(
        self,
        leases: BatchLeases,
        runner: Runner,
        engines: Engines,
        catalog: Catalog,
        *,
        max_in_flight: int,
        max_waiting: int,
        sweep: Callable[[], None],
        forget: Callable[[], None],
    ) -> None:
        self._leases = leases
        self._runner = runner
        self._engines = engines
        self._catalog = catalog
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self._sweep = sweep
        self._forget = forget
        self._threads = ThreadPoolExecutor(2, "batches")
        self._held: set[Held] = set()
        self._paces: dict[str, Pace] = {}
        self._no_quota_until: dict[str, float] = {}  # by workspace, when to look again
        self._answers: list[Answer] = []
        self._wake = asyncio.Event()
        self._answered = asyncio.Event()

    def wake(self) -> None:
        """There may be something to lease."""
        self._wake.set()

    async def run(self) -> None:
        """Works until cancelled; then gives back what it holds."""
        loops = [
            asyncio.create_task(forever(work, pause_s=pause, what="batches"))
            for work, pause in (
                (self._lease, 0.0),
                (self._watch, _LOOK_S),
                (self._write, 0.0),
                (self._tidy, _SWEEP_S),
                (self._clear, _FORGET_S),
            )
        ]
        try:
            await asyncio.gather(*loops)
        finally:
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)
            await self._give_back()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    # ------------------------------------------------------------------------------------------ taking

    async def _lease(self) -> None:
        """One look at what there is room for, then a pause until that changes."""
        self._wake.clear()
        now = asyncio.get_running_loop().time()
        num_waiting = Counter(held.weights for held in self._held if held.waiting)
        in_flight = Counter(held.weights for held in self._held)
        ids = self._catalog.ids_by_weights()
        rooms = {}
        for weights in ids:
            if self._engines.state(weights) is ModelState.READY:
                pace = self._pace(weights)
                pace.look(num_waiting[weights], now)
                rooms[weights] = pace.room(num_waiting[weights], in_flight[weights], now)
        if any(rooms.values()) and self._room_for_any():
            waiting = [
                batch
                for batch in await self._in_thread(self._leases.waiting)
                if self._no_quota_until.get(batch.workspace_id, 0.0) <= now
            ]
            for weights, room in rooms.items():
                others = frozenset[str]().union(*(of for name, of in ids.items() if name != weights))
                took = await self._fill(weights, room, waiting, others)
                self._pace(weights).sent(num_waiting[weights] + took)
        await self._pause()

    async def _pause(self) -> None:
        """Until something changes, here or (perhaps) in another process; what changes together is seen together."""
        try:
            async with asyncio.timeout(_LOOK_S):
                await self._wake.wait()
        except TimeoutError:
            return
        await asyncio.sleep(_GROUP_S)

    def _room_for_any(self) -> int:
        """How many more requests this process may hold at all."""
        if sum(len(held.leased.body) for held in self._held) >= HELD_BYTES:
            return 0
        return max(0, self._max_in_flight - len(self._held))

    async def _fill(self, weights: str, room: int, waiting: Sequence[Waiting], others: Collection[str]) -> int:
        """Leases at most `room` requests for one model, in turns between workspaces; returns how many."""
        left = list(waiting)
        took = 0
        while left and (free := min(room - took, self._room_for_any())) > 0:
            batch = min(left, key=self._turn)  # the oldest of the workspace that has least under way for its weight
            share = math.ceil(free / len({each.workspace_id for each in left}))
            leased = await self._in_thread(
                partial(
                    self._leases.lease,
                    batch.batch_id,
                    num_items=share,
                    num_bytes=HELD_BYTES // 4,
                    without_models=others,
                )
            )
            for each in leased:
                self._begin(Held(each, weights))
            took += len(leased)
            if len(leased) < share:
                left.remove(batch)
        return took

    def _turn(self, batch: Waiting) -> float:
        under_way = sum(held.leased.principal.workspace_id == batch.workspace_id for held in self._held)
        return under_way / self._catalog.weight(batch.plan)

    def _pace(self, weights: str) -> Pace:
        return self._paces.setdefault(weights, Pace(self._max_waiting))

    # ------------------------------------------------------------------------------------------ answering

    def _begin(self, held: Held) -> None:
        self._held.add(held)
        held.task = asyncio.create_task(self._work(held))

    async def _work(self, held: Held) -> None:
        """One request, to its answer. Cancelled without `stop_as`, it leaves none: this process ends."""
        try:
            answer = await self._answer(held)
        except asyncio.CancelledError:
            if held.stop_as is None:
                raise
            answer = Answer(held.leased, held.stop_as, None, None)
        held.waiting = False
        self._answers.append(answer)
        self._answered.set()
        self._wake.set()

    async def _answer(self, held: Held) -> Answer:
        leased = held.leased
        try:
            prepared = await self._runner.prepare(leased)
            held.weights = prepared.listed.spec.weights
            pace = self._pace(held.weights)

            def started() -> None:
                held.waiting = False
                pace.started()
                self._wake.set()

            outcome = await self._runner.answer(prepared, pace, started)
            held.reservation = outcome.reservation
            return outcome.answer
        except ApiError as error:
            return errored(leased, error)
        except NoQuota as none:
            self._no_quota_until[leased.principal.workspace_id] = asyncio.get_running_loop().time() + min(
                none.seconds, _QUOTA_LOOK_S
            )
            return Answer(leased, "queued", None, None)
        except Exception:
            log.exception("%s failed", leased.request_id)
            return errored(leased, internal_error())

    async def _write(self) -> None:
        """What has been answered since the last commit, in one."""
        if not self._answers:
            self._answered.clear()
            await self._answered.wait()
            await asyncio.sleep(_GROUP_S)
        answers = list(self._answers)
        counted = await self._in_thread(lambda: self._leases.answer(answers))
        del self._answers[: len(answers)]
        done = {id(answer.leased) for answer in answers}
        for held in [held for held in self._held if id(held.leased) in done]:
            self._held.discard(held)
            if held.reservation is not None:
                held.reservation.release()
        self._wake.set()
        if len(counted) < len(answers):
            log.warning("%d answers of batches came too late and do not count", len(answers) - len(counted))
        for answer in counted:
            if answer.state != "queued":
                _measure(answer)

    # ------------------------------------------------------------------------------------------ ending

    async def _watch(self) -> None:
        """Ends what runs of batches that have been canceled or have expired; leaves room for interactive requests."""
        batch_ids = {held.leased.batch_id for held in self._held}
        if not batch_ids:
            return
        stopped = await self._in_thread(lambda: self._leases.to_abort(batch_ids))
        interactive = await self._in_thread(self._leases.interactive)
        in_flight = Counter(held.weights for held in self._held)
        now = asyncio.get_running_loop().time()
        for weights, pace in self._paces.items():
            pace.heed(in_flight[weights], interactive=interactive, now=now)
        for held in self._held:
            if held.leased.batch_id in stopped and held.stop_as is None and held.task is not None:
                held.stop_as = stopped[held.leased.batch_id]
                held.task.cancel()

    async def _tidy(self) -> None:
        back = await self._in_thread(self._leases.requeue_dead)
        if back:
            log.warning("%d requests of batches are queued again: the process that had them died", back)
        await self._in_thread(self._sweep)

    async def _clear(self) -> None:
        await self._in_thread(self._forget)

    async def _give_back(self) -> None:
        """At this process's end: what is answered is written, the rest is for the others."""
        tasks = [held.task for held in self._held if held.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        answered = {id(answer.leased) for answer in self._answers}
        back = [Answer(h.leased, "queued", None, None) for h in self._held if id(h.leased) not in answered]
        try:
            if self._answers or back:
                await self._in_thread(lambda: self._leases.answer([*self._answers, *back]))
        except SQLAlchemyError as error:
            log.error("%d requests of batches wait until this process counts as dead: %s", len(back), remedy(error))
        self._threads.shutdown()


def _measure(answer: Answer) -> None:
    used = answer.usage
    model = answer.leased.model
    metrics.BATCH_REQUESTS.labels(model, answer.state).inc()
    if used is not None:
        metrics.TOKENS.labels(model, "input").inc(used.input_tokens)
        metrics.TOKENS.labels(model, "cache_read").inc(used.cache_read_input_tokens)
        metrics.TOKENS.labels(model, "output").inc(used.output_tokens)
