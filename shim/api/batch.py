"""`/v2/batch`: a batch is accepted whole or not at all, and durable before its 202; then listed, read, canceled.

The body is never held: as it arrives it is cut into requests, which are checked and spooled (`batches/intake.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from aiexport_edge.shim import json_body
from aiexport_edge.shim.address_policy import Forbidden
from aiexport_edge.shim.api.access import enter
from aiexport_edge.shim.api.paging import after_id_of, limit_of, page, unknown_cursor
from aiexport_edge.shim.batches.intake import Intake
from aiexport_edge.shim.batches.item import Item, engine_request
from aiexport_edge.shim.body import BodyLease, BodyReader
from aiexport_edge.shim.engines.generation import ClientGone
from aiexport_edge.shim.errors import ApiError, Conflict, InvalidRequest, NotFound, Overloaded, quoted
from aiexport_edge.shim.exchange import exchange_of
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store import Missing, Principal, StoreError
from aiexport_edge.shim.store.batch_values import Batch, Result

T = TypeVar("T")

STALL_S = 120.0  # a client that takes nothing of the results for so long is given up
_FEED_BYTES = 256 << 10


class CreateBatch:
    """`POST /v2/batch`, as an ASGI endpoint: it streams the body."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services = self._services
        principal = await enter(services, scope, "batch")
        headers = dict(scope["headers"])
        json_body.require_json(headers.get(b"content-type"), headers.get(b"content-encoding"))
        intake = Intake(
            partial(self._check, principal=principal),
            images=services.image_rules,
            max_requests=services.config.plans[principal.plan].batch_size,
            max_request_bytes=services.config.shim.max_body_bytes,
            directory=services.config.state,
        )
        try:
            reader = BodyReader(scope["headers"], receive, max_bytes=services.config.batches.max_body_bytes)
            with services.bodies.lease() as memory, services.batch_spool.lease() as spool:
                await self._take_in(reader, intake, memory, spool)
                webhook_url = await self._in_thread(intake.finish)
                self._check_webhook(webhook_url)
                origin_id = exchange_of(scope).origin_id
                batch = await self._in_thread(partial(self._store, principal, intake, webhook_url, origin_id))
        finally:
            intake.close()
        exchange_of(scope).facts.update(batch=batch.id, requests=batch.num_total)
        services.batches.wake()
        await _respond(send, 202, batch.document())

    async def _take_in(self, reader: BodyReader, intake: Intake, memory: BodyLease, spool: BodyLease) -> None:
        """Reads the body to its end, also past an error: a client that still sends would not hear of it."""
        problem: ApiError | None = None
        pending = bytearray()
        while not reader.ended:
            piece = await reader.next()
            if problem is not None:
                continue
            pending += piece
            if len(pending) < _FEED_BYTES and not reader.ended:
                continue
            try:
                memory.grow(max(0, len(pending) + intake.held_bytes - memory.size))
                spool.grow(len(pending))
                await self._in_thread(partial(intake.feed, bytes(pending)))
            except ApiError as error:
                problem = error
            pending.clear()
        if problem is not None:
            raise problem

    def _check(self, item: Item, *, principal: Principal) -> str:
        """The id of the model that the request is for. Raises `ApiError` for one that could not be run."""
        listed, _ = engine_request(item, self._services.catalog, principal, "")
        return listed.id

    def _check_webhook(self, url: str | None) -> None:
        if url is None:
            return
        try:
            self._services.webhook_policy.check(url)
        except Forbidden as problem:
            raise InvalidRequest(f"webhook_url: {problem}", param="webhook_url") from None

    def _store(self, principal: Principal, intake: Intake, webhook_url: str | None, origin_id: str | None) -> Batch:
        """`origin_id`: of the call's Idempotency-Key; a process that died may have made the batch of it already."""
        rows = self._services.batch_rows
        try:
            made = None if origin_id is None else rows.made_of(origin_id)
            return made or rows.create(
                principal.workspace_id,
                principal.key_id,
                intake.items(),
                num_items=intake.num_requests,
                webhook_url=webhook_url,
                origin_id=origin_id,
            )
        except StoreError as error:
            raise Overloaded(str(error), retry_after=1.0) from None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._services.batch_threads, work)


class Batches:
    """The other endpoints. Another workspace's batch is not there."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def list_batches(self, request: Request) -> Response:
        principal = await enter(self._services, request.scope, "batch")
        limit, after_id = limit_of(request), after_id_of(request, "batch")
        rows = self._services.batch_rows
        try:
            found, has_more = await self._in_thread(
                lambda: rows.page(principal.workspace_id, limit=limit, after_id=after_id)
            )
        except Missing:
            raise unknown_cursor(after_id or "", "batch") from None
        return _json(page([batch.document() for batch in found], has_more=has_more))

    async def get_batch(self, request: Request) -> Response:
        return _json((await self._find(request)).document())

    async def cancel_batch(self, request: Request) -> Response:
        principal = await enter(self._services, request.scope, "batch")
        batch_id = _batch_id(request)
        rows = self._services.batch_rows
        try:
            batch = await self._in_thread(lambda: rows.cancel(batch_id, principal.workspace_id))
        except Missing:
            raise _not_found(batch_id) from None
        self._services.batches.wake()
        return _json(batch.document())

    async def _find(self, request: Request) -> Batch:
        principal = await enter(self._services, request.scope, "batch")
        batch_id = _batch_id(request)
        rows = self._services.batch_rows
        try:
            return await self._in_thread(lambda: rows.get(batch_id, principal.workspace_id))
        except Missing:
            raise _not_found(batch_id) from None

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._services.threads, work)


class BatchResults(Batches):
    """`GET /v2/batch/{id}/results`, as an ASGI endpoint: JSON Lines, as fast as the client takes them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        batch = await self._find(Request(scope))
        if batch.ended_at is None:
            raise Conflict(f"The batch is {batch.status}; its results can be read when it has ended.", retry_after=10.0)
        headers = [(b"content-type", b"application/x-jsonl; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for lines in self._lines(batch):
                async with asyncio.timeout(STALL_S):
                    await send({"type": "http.response.body", "body": lines, "more_body": True})
        except TimeoutError:
            raise ClientGone("takes no bytes") from None
        await send({"type": "http.response.body", "body": b""})

    async def _lines(self, batch: Batch) -> AsyncIterator[bytes]:
        rows, index = self._services.batch_rows, 0
        while index < batch.num_total:
            results = await self._in_thread(partial(rows.results, batch.id, index))
            if not results:
                raise RuntimeError(f"{batch.id} was deleted while its results were read")  # the connection breaks off
            yield b"".join(_line(result) for result in results)
            index = results[-1].index + 1


def _line(result: Result) -> bytes:
    """One line of the results. The stored body is JSON already."""
    match result.state:
        case "succeeded":
            what = b',"message":' + (result.body or b"null")
        case "errored":
            what = b',"error":' + (result.body or b"null")
        case _:
            what = b""
    custom_id = msgspec.json.encode(result.custom_id)
    kind = result.state.encode()
    return b'{"index":%d,"custom_id":%s,"result":{"type":"%s"%s}}\n' % (result.index, custom_id, kind, what)


def _batch_id(request: Request) -> str:
    """The one in the path. Raises `NotFound` for one that no store can hold."""
    batch_id: str = request.path_params["batch_id"]
    if "\0" in batch_id:
        raise _not_found(batch_id)
    return batch_id


def _not_found(batch_id: str) -> NotFound:
    return NotFound(f"There is no batch {quoted(batch_id)}.")


def _json(document: Any) -> Response:
    return Response(msgspec.json.encode(document), media_type="application/json")


async def _respond(send: Send, status: int, document: Any) -> None:
    body = msgspec.json.encode(document)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
