"""`/v2/keys`: a workspace's program lists, makes, rotates and ends the API keys of its own workspace.

A credential gives no more than it has: a key that it makes or rotates has no scope that it does not hold itself, and a
test key makes test keys. Another workspace's key is a 404, as is one that never was or has been deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from aiexport_edge.proto.units import parse_duration
from aiexport_edge.shim import json_body
from aiexport_edge.shim.api.access import enter
from aiexport_edge.shim.api.paging import after_id_of, limit_of, page, unknown_cursor
from aiexport_edge.shim.body import read_body
from aiexport_edge.shim.errors import InvalidRequest, NotFound, PermissionDenied
from aiexport_edge.shim.fields import Object, Value
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store import CreatedKey, InvalidValue, Key, Missing, NotAllowed, Principal, TooMany
from aiexport_edge.shim.store.key_rows import KeyRows
from aiexport_edge.shim.store.keys import DEFAULT_SCOPES, SCOPES

MAX_BODY_BYTES = 64 << 10
DEFAULT_GRACE_S = 24 * 3600
MAX_GRACE_S = 365 * 24 * 3600
MAX_LIFETIME_S = 100 * 366 * 24 * 3600

T = TypeVar("T")


class Keys:
    """The four endpoints. All need the scope `keys`."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._rows = KeyRows(services.store.database)

    async def list_keys(self, request: Request) -> Response:
        """Newest first, expired ones too, deleted ones not."""
        principal = await enter(self._services, request.scope, "keys")
        limit, after_id = limit_of(request), after_id_of(request, "key")
        try:
            found, has_more = await self._in_thread(lambda: self._rows.page(principal.workspace_id, limit, after_id))
        except NotFound:
            raise unknown_cursor(after_id or "", "key") from None
        return _json(200, page([_described(key) for key in found], has_more=has_more))

    async def create(self, request: Request) -> Response:
        """`{"scopes"?, "expires_in"?}`: seconds, or text such as "90d"."""
        principal = await enter(self._services, request.scope, "keys")
        body = await self._body(request)
        scopes = body.read("scopes", _scopes)
        expires_in = body.read("expires_in", _lifetime)
        granted = _granted(principal, scopes)
        created, key = await self._in_thread(
            lambda: self._rows.create(principal.workspace_id, granted, expires_in=expires_in, test=principal.test)
        )
        return _json(201, _shown(created, key))

    async def rotate(self, request: Request) -> Response:
        """`{"grace_seconds"?}`: how long the old key goes on beside the new one."""
        principal = await enter(self._services, request.scope, "keys")
        body = await self._body(request)
        seconds = body.read("grace_seconds", lambda value: value.integer(0, MAX_GRACE_S))
        grace = timedelta(seconds=DEFAULT_GRACE_S if seconds is None else seconds)
        key_id = _key_id(request)
        created, rotated, key = await self._in_thread(
            lambda: self._rows.rotate(principal.workspace_id, key_id, grace, within=principal.scopes)
        )
        self._services.authenticator.forget()
        old = {"old_key_id": rotated.old_key_id, "old_expires_at": _time(rotated.old_expires_at)}
        return _json(201, {**_shown(created, key), **old})

    async def delete(self, request: Request) -> Response:
        """Ends a key at once: its own too, if the caller says so."""
        principal = await enter(self._services, request.scope, "keys")
        key_id = _key_id(request)
        await self._in_thread(lambda: self._rows.revoke(principal.workspace_id, key_id))
        self._services.authenticator.forget()
        return Response(status_code=204)

    async def _body(self, request: Request) -> Object:
        """The body's object; every field here may be left out, and so may the body."""
        headers = dict(request.scope["headers"])
        json_body.require_json(headers.get(b"content-type"), headers.get(b"content-encoding"))
        with self._services.bodies.lease() as lease:
            body = await read_body(request.scope["headers"], request.receive, max_bytes=MAX_BODY_BYTES, lease=lease)
        return Value(json_body.parse(body) if body.strip() else {}, "").object()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """`work` on the store, its refusals as a client sees them."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._services.threads, work)
        except Missing:
            raise NotFound("There is no such key.") from None
        except NotAllowed as refused:
            raise PermissionDenied(str(refused)) from None
        except (InvalidValue, TooMany) as refused:
            raise InvalidRequest(str(refused)) from None


def _key_id(request: Request) -> str:
    """The one in the path. Raises `NotFound` for one that no store can hold."""
    key_id: str = request.path_params["key_id"]
    if "\0" in key_id:
        raise NotFound("There is no such key.")
    return key_id


def _scopes(value: Value) -> tuple[str, ...]:
    scopes = tuple(dict.fromkeys(item.choice(*SCOPES) for item in value.items()))
    if not scopes:
        raise value.wrong("must name at least one scope")
    return scopes


def _granted(principal: Principal, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """The scopes of a new key: those asked for, or of the ones that a new key has those that the caller holds."""
    if asked is None:
        asked = tuple(scope for scope in DEFAULT_SCOPES if scope in principal.scopes)
        if not asked:
            raise PermissionDenied(
                f"The caller has none of the scopes of a new key ({', '.join(DEFAULT_SCOPES)}) to give.", param="scopes"
            )
    for scope in asked:
        if scope not in principal.scopes:
            raise PermissionDenied(f'The caller does not have the scope "{scope}" to give.', param="scopes")
    return asked


def _lifetime(value: Value) -> timedelta:
    if isinstance(value.raw, str):
        try:
            return parse_duration(value.text())
        except ValueError:
            raise value.wrong("must be seconds, or a duration such as 90d, 24h, 30m or 45s") from None
    return timedelta(seconds=value.integer(1, MAX_LIFETIME_S))


def _described(key: Key) -> dict[str, Any]:
    return {
        "id": key.key_id,
        "type": "api_key",
        "scopes": key.scopes,
        "test": key.test,
        "created_at": _time(key.created_at),
        "expires_at": _time(key.expires_at),
    }


def _shown(created: CreatedKey, key: Key) -> dict[str, Any]:
    """A new key, with itself: only here."""
    return {"id": key.key_id, "type": "api_key", "key": created.key, **_described(key)}


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds").replace("+00:00", "Z")


def _json(status: int, document: Any) -> Response:
    headers = {"cache-control": "no-store"}  # a key may be in it
    return Response(msgspec.json.encode(document), status, headers=headers, media_type="application/json")
