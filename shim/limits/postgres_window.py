"""The calls of a minute in PostgreSQL: exact over every machine that shares it, for one short transaction a call.

It locks the workspace and reads the database's own clock, which is one for all. Rows older than a minute go with the
call that finds them. The table is not logged, and its commits wait for no disk: a crash of the database forgets a
minute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from sqlalchemy import Engine, delete, select, text

from aiexport_edge.shim.limits.window import WINDOW_S, Taken
from aiexport_edge.shim.store.database import write
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.schema import calls

T = TypeVar("T")

_WINDOW_US = int(WINDOW_S * 1e6)
_NO_WAIT = text("SET LOCAL synchronous_commit = off")
_LOCK = text(
    "SELECT set_config('synchronous_commit', 'off', true), "
    "pg_advisory_xact_lock(hashtextextended(CAST(:workspace_id AS text), 0))"
)
# A statement of its own: one that has waited for the lock sees the table as it was before. What lies ahead of now goes
# too: the server's clock has been set back, and would count it for as long.
_TAKE = text("""
WITH clock AS MATERIALIZED (SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint) AS now),
gone AS (
    DELETE FROM calls USING clock WHERE workspace_id = :workspace_id AND (at <= now - :window OR at > now)
),
seen AS (
    SELECT now, count(at) AS used, max(at) AS newest
    FROM clock LEFT JOIN calls ON workspace_id = :workspace_id AND at > now - :window AND at <= now GROUP BY now
),
taken AS (
    INSERT INTO calls (id, workspace_id, at)
    SELECT :mark, :workspace_id, now FROM seen WHERE used < :most RETURNING at
)
SELECT now, used, newest FROM seen
""")


class PostgresWindow:
    """Counts in the store itself, from threads."""

    def __init__(self, database: Engine, threads: Executor) -> None:
        self._database = database
        self._threads = threads

    async def take(self, workspace_id: str, limit: int) -> Taken:
        return await self._in_thread(lambda: self._take(workspace_id, limit))

    async def give_back(self, workspace_id: str, mark: str | int) -> None:
        await self._in_thread(lambda: self._give_back(str(mark)))

    async def close(self) -> None:
        """The store is not this one's to close."""

    def _take(self, workspace_id: str, limit: int) -> Taken:
        mark = new_id("call_")
        mine = {"workspace_id": workspace_id, "window": _WINDOW_US, "most": limit, "mark": mark}
        with write(self._database) as connection:
            connection.execute(_LOCK, {"workspace_id": workspace_id})
            now, used, newest = connection.execute(_TAKE, mine).one()
            if used < limit:
                return Taken(mark, limit - used - 1, WINDOW_S)
            times = select(calls.c.at).where(calls.c.workspace_id == workspace_id).order_by(calls.c.at.desc())
            free_at = connection.execute(times.offset(limit - 1).limit(1)).scalar_one() + _WINDOW_US
            return Taken(None, 0, (newest + _WINDOW_US - now) / 1e6, (free_at - now) / 1e6)

    def _give_back(self, mark: str) -> None:
        with write(self._database) as connection:
            connection.execute(_NO_WAIT)
            connection.execute(delete(calls).where(calls.c.id == mark))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
