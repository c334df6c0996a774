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

from sqlalchemy import Engine, delete, func, insert, or_, select, text

from aiexport_edge.shim.limits.window import WINDOW_S, Taken
from aiexport_edge.shim.store.database import write
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.schema import calls

T = TypeVar("T")

_WINDOW_US = int(WINDOW_S * 1e6)
_NO_WAIT = text("SET LOCAL synchronous_commit = off")
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended(:workspace_id, 0))")
# A statement of its own: one that has waited for the lock sees the table as it was before.
_NOW = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")


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
        mine = calls.c.workspace_id == workspace_id
        with write(self._database) as connection:
            connection.execute(_NO_WAIT)
            connection.execute(_LOCK, {"workspace_id": workspace_id})
            now = int(connection.execute(_NOW).scalar_one())
            # also what lies ahead: the server's clock has been set back, and would count it for as long
            connection.execute(delete(calls).where(mine, or_(calls.c.at <= now - _WINDOW_US, calls.c.at > now)))
            used, newest = connection.execute(select(func.count(), func.max(calls.c.at)).where(mine)).one()
            if used >= limit:
                nth = select(calls.c.at).where(mine).order_by(calls.c.at.desc()).offset(limit - 1).limit(1)
                free_at = int(connection.execute(nth).scalar_one()) + _WINDOW_US
                return Taken(None, 0, (newest + _WINDOW_US - now) / 1e6, (free_at - now) / 1e6)
            mark = new_id("call_")
            connection.execute(insert(calls).values(id=mark, workspace_id=workspace_id, at=now))
        return Taken(mark, limit - used - 1, WINDOW_S)

    def _give_back(self, mark: str) -> None:
        with write(self._database) as connection:
            connection.execute(_NO_WAIT)
            connection.execute(delete(calls).where(calls.c.id == mark))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
