"""`GET /v2/usage`: what the caller's workspace has used, over days of UTC, by model, key or day."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial

import msgspec
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import Response

from aiexport_edge.shim.api.access import enter
from aiexport_edge.shim.errors import InvalidRequest, quoted
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store.usage_sums import GROUPS
from aiexport_edge.shim.usage_report import BadPeriod, Period, report

_encoder = msgspec.json.Encoder(decimal_format="number")


class Usage:
    """The endpoint."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def get_usage(self, request: Request) -> Response:
        principal = await enter(self._services, request.scope, "usage")
        query = request.query_params
        group_by = next((group for group in GROUPS if group == query.get("group_by")), None)
        if group_by is None and query.get("group_by") is not None:
            raise InvalidRequest(
                f"group_by: must be one of {', '.join(GROUPS)}, not {quoted(query['group_by'])}", param="group_by"
            )
        try:
            period = Period.parse(query.get("start"), query.get("end"))
        except BadPeriod as bad:
            given = quoted(query[bad.field]) if bad.field in query else "today"
            raise InvalidRequest(f"{bad.field}: {bad}, not {given}", param=bad.field) from None
        with contextlib.suppress(SQLAlchemyError):  # what can't be written yet, the ledger tells in the log, and keeps
            await self._services.ledger.flush()  # what this process has replied counts
        loop = asyncio.get_running_loop()
        read = partial(
            report, self._services.store.database, period, workspace_id=principal.workspace_id, group_by=group_by
        )
        document = await loop.run_in_executor(self._services.threads, read)
        return Response(_encoder.encode(document), media_type="application/json")
