"""From a leased request to its answer: as often as it takes, where the fault is not the request's own.

Passing faults (no room, no engine, a model that loads) are waited out; what the engine fails at is tried a few times.
Only a whole reply is answered and billed; a request that is stopped halfway is neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import json_body
from aiexport_edge.shim.api.reply import message_object
from aiexport_edge.shim.batches.item import Item, engine_request, read_item
from aiexport_edge.shim.batches.pace import Pace
from aiexport_edge.shim.body import BodyBudget
from aiexport_edge.shim.catalog import Catalog, Listed
from aiexport_edge.shim.engines.engines import Engines
from aiexport_edge.shim.engines.generation import Generation
from aiexport_edge.shim.errors import ApiError, InternalError, NotFetched, Overloaded, RateLimited
from aiexport_edge.shim.images.fetch import ImageFetcher
from aiexport_edge.shim.images.sources import ImageRules
from aiexport_edge.shim.limits.limits import Limits, OverQuota, Reservation
from aiexport_edge.shim.prices import Price
from aiexport_edge.shim.store.batch_values import Answer, Leased
from aiexport_edge.shim.store.errors import remedy
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.values import UsageRow
from aiexport_edge.shim.telemetry import Tracing, batch_request_span

PREPARE_IN_THREAD_BYTES = 256 << 10
FETCH_RETRY_S = 2.0  # before a picture is asked for again
MAX_TRIES = 3  # of a request that the engine fails at; it may be what breaks it

log = logging.getLogger(__name__)


class NoQuota(Exception):
    """The workspace's tokens of the day are used or in flight. `seconds` until there may be some."""

    def __init__(self, seconds: float) -> None:
        super().__init__("no tokens are left")
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Prepared:
    """A leased request that is ready to be sent."""

    leased: Leased
    item: Item
    listed: Listed
    request: pb.GenerateRequest


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer, and the tokens of the day's quota that are held for it until it is written."""

    answer: Answer
    reservation: Reservation | None = None


class Runner:
    """What answering needs."""

    def __init__(
        self,
        engines: Engines,
        catalog: Catalog,
        limits: Limits,
        images: ImageRules,
        fetcher: ImageFetcher,
        bodies: BodyBudget,
        tracing: Tracing | None,
    ) -> None:
        self._engines = engines
        self._catalog = catalog
        self._limits = limits
        self._images = images
        self._fetcher = fetcher
        self._bodies = bodies
        self._tracing = tracing

    async def prepare(self, leased: Leased) -> Prepared:
        """Raises `ApiError` for a request that can't be sent: its model or plan has changed since it was accepted."""
        if len(leased.body) < PREPARE_IN_THREAD_BYTES:
            return self._prepare(leased)
        return await asyncio.to_thread(self._prepare, leased)

    def _prepare(self, leased: Leased) -> Prepared:
        item = read_item(json_body.parse(leased.body), "", self._images)
        listed, request = engine_request(item, self._catalog, leased.principal, leased.request_id)
        return Prepared(leased, item, listed, request)

    async def answer(self, prepared: Prepared, pace: Pace, started: Callable[[], None]) -> Outcome:
        """Calls `started` when an engine begins it. Raises `NoQuota`; cancelled, it leaves nothing at the engines."""
        loop = asyncio.get_running_loop()
        tries = 0
        while True:
            await asyncio.sleep(max(0.0, pace.open_at - loop.time()))
            try:
                return await self._try(prepared, pace, started)
            except (Overloaded, RateLimited) as passing:
                pace.refused(loop.time(), passing.retry_after)
            except SQLAlchemyError as error:
                log.error("%s waits, the store does not answer: %s", prepared.leased.request_id, remedy(error))
                pace.refused(loop.time(), None)
            except InternalError as error:
                tries += 1
                log.warning("%s failed (try %d of %d)", prepared.leased.request_id, tries, MAX_TRIES)
                if tries == MAX_TRIES:
                    return Outcome(errored(prepared.leased, error))
                pace.refused(loop.time(), None)
            except NotFetched as error:
                tries += 1
                if tries == MAX_TRIES:
                    return Outcome(errored(prepared.leased, error))
                await asyncio.sleep(FETCH_RETRY_S)
            except ApiError as error:
                return Outcome(errored(prepared.leased, error))

    async def _try(self, prepared: Prepared, pace: Pace, started: Callable[[], None]) -> Outcome:
        leased = prepared.leased
        quota = await self._limits.quota(leased.principal, fresh_s=1.0)
        if quota.left == 0:
            raise NoQuota(quota.retry_after_s)
        request = pb.GenerateRequest()
        request.CopyFrom(prepared.request)  # going on after a lost engine writes into it
        facts: dict[str, Any] = {
            "workspace": leased.principal.workspace,
            "key": leased.principal.key_id,
            "model": prepared.listed.id,
            "batch": leased.batch_id,
        }
        with (
            batch_request_span(self._tracing, leased.request_id, facts) as carried,
            self._bodies.lease() as lease,
            contextlib.ExitStack() as stack,
        ):
            request.metadata.update(carried)
            images = await self._fetcher.fetch_all(prepared.item.request.images, lease.grow)
            generation = Generation(request, images)
            stack.callback(self._engines.abort, generation)
            accepted = await self._engines.admit(generation)
            reservation = await self._reserve(leased, accepted)
            stack.callback(reservation.release)
            text, finished = await _collect(generation, pace, started)
            facts |= {"input": accepted.prompt_tokens, "output": finished.output_tokens, "outcome": "completed"}
            stack.pop_all()
        return Outcome(_succeeded(prepared, generation, text, finished), reservation)

    async def _reserve(self, leased: Leased, accepted: pb.Accepted) -> Reservation:
        """Under an id of its own: another process may have had this request, and not have let go yet."""
        tokens = accepted.prompt_tokens + accepted.max_tokens
        reserving = asyncio.ensure_future(self._limits.reserve_tokens(leased.principal, tokens, new_id("hold_")))
        try:
            return await asyncio.shield(reserving)
        except OverQuota as over:
            raise NoQuota(over.quota.retry_after_s) from None
        except asyncio.CancelledError:
            reserving.add_done_callback(_let_go)
            raise


def _let_go(reserving: asyncio.Future[Reservation]) -> None:
    """Nobody waits for it any more."""
    if not reserving.cancelled() and reserving.exception() is None:
        reserving.result().release()


def errored(leased: Leased, error: ApiError) -> Answer:
    """The answer that a request gets for its own fault."""
    detail: dict[str, Any] = {"type": error.type, "message": error.message}
    if error.param is not None:
        detail["param"] = error.param
    return Answer(leased, "errored", msgspec.json.encode(detail), None)


async def _collect(generation: Generation, pace: Pace, started: Callable[[], None]) -> tuple[str, pb.Finished]:
    """The whole reply. Raises what ended the generation."""
    texts: list[str] = []
    now = asyncio.get_running_loop().time
    said = False
    last: float | None = None  # when the last token came

    def on_news() -> bool:
        nonlocal said, last
        if generation.started and not said:
            said = True
            started()
        text = generation.take()
        if text:
            texts.append(text)
            if last is not None:
                pace.step(now() - last)
            last = now()
        return generation.finished is not None

    await generation.follow(on_news)
    assert generation.finished is not None
    return "".join(texts), generation.finished


def _succeeded(prepared: Prepared, generation: Generation, text: str, finished: pb.Finished) -> Answer:
    leased, spec = prepared.leased, prepared.listed.spec
    assert generation.accepted is not None
    prompt_tokens, cached_tokens = generation.accepted.prompt_tokens, generation.cached_tokens or 0
    message = message_object(
        new_id("msg_"),
        prepared.item.request.model,
        text,
        finished,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        output_tokens=finished.output_tokens,
    )
    price = Price.per_million(spec.input_per_million, spec.output_per_million, batch=True)
    now = datetime.now(UTC)
    usage = UsageRow(
        request_id=leased.request_id,
        message_id=message["id"],
        workspace_id=leased.principal.workspace_id,
        key_id=leased.principal.key_id,
        model=prepared.listed.id,
        status="completed",
        input_tokens=prompt_tokens - cached_tokens,
        cache_read_input_tokens=cached_tokens,
        output_tokens=finished.output_tokens,
        created_at=now,
        ended_at=now,
        batch=True,
        cost=prompt_tokens * price.input + finished.output_tokens * price.output,
    )
    return Answer(leased, "succeeded", msgspec.json.encode(message), usage)
