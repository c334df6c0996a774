"""Usage rows in the database, one transaction at a time.

A row is written `running` when a request is admitted, and settled at its end; that same transaction adds it to the sums
(`usage_sums.py`). A row that is settled again, because its process was only asleep when another settled it, changes the
sums by the difference. So the sums are those of the settled rows, always, and stay when the rows are deleted.

Rows of one process are written in batches by one thread (`shim/usage.py`); `record` is for those who settle in a
transaction of their own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BindParameter, Connection, Engine, RowMapping, bindparam, delete, insert, select, update

from aiexport_edge.shim.store import quotas, usage_sums
from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.days import milliseconds_of
from aiexport_edge.shim.store.quotas import Claim, Decision
from aiexport_edge.shim.store.rows import now_ms
from aiexport_edge.shim.store.schema import processes, reservations, usage
from aiexport_edge.shim.store.values import UsageRow

_IDS_AT_ONCE = 1000
BEAT_S = 0.5  # no more heartbeats than that
DOUBT = timedelta(seconds=4)  # a heartbeat that looks old must have stood still for so long: the clock may have jumped

_CHANGED = (
    "status",
    "input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "cost",
    "first_token_at",
    "ended_at",
)

# The statements of every request, put together once: that costs several times what it takes to run them.
_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_CHANGE = (
    update(usage)
    .where(usage.c.request_id == bindparam("row_id"))
    .values({name: bindparam(f"new_{name}") for name in _CHANGED})
)
_CHANGE_RUNNING = _CHANGE.where(usage.c.status == "running")
_INSERT = insert(usage)
_FIND = select(usage).where(usage.c.request_id.in_(_IDS)).order_by(usage.c.request_id).with_for_update()
_BEAT = (
    update(processes)
    .where(processes.c.id == bindparam("process_id"))
    .values(heartbeat_at=bindparam("new_heartbeat_at"))
)


# ---------------------------------------------------------------------------------------------- in a transaction


def record(connection: Connection, rows: Iterable[UsageRow], process_id: str) -> None:
    """Writes rows that have ended, once each whatever happens: one whose id is there already is left as it is.

    Their reservations go. For a transaction that settles something else along with the usage.
    """
    rows = [row for row in rows if row.status != "running"]
    known = usage.c.request_id.in_([row.request_id for row in rows])
    there = set(connection.execute(select(usage.c.request_id).where(known)).scalars())
    new = [row for row in rows if row.request_id not in there]
    if new:
        connection.execute(_INSERT, [_inserted(row, process_id) for row in new])
    usage_sums.add(connection, new)
    quotas.release(connection, [row.request_id for row in rows])


# ---------------------------------------------------------------------------------------------- one process's rows


class UsageRows:
    """The rows of one process. `process_id` names it; not thread-safe, one thread owns it."""

    def __init__(self, database: Engine, process_id: str) -> None:
        self._database = database
        self.process_id = process_id
        self._beat = -math.inf  # when the last heartbeat was written, by the monotonic clock
        self._heard: dict[str, tuple[int, float]] = {}  # others' last heartbeats, and since when they stand still

    def save(
        self,
        reserved: Sequence[UsageRow],
        changed: Sequence[UsageRow],
        claims: Sequence[Claim] = (),
        released: Sequence[str] = (),
        looks: Iterable[tuple[str, int]] = (),
    ) -> Decision:
        """One transaction: brings `changed` up to date, settles those that have ended, lets go of the reservations
        `released`, then decides `claims` in order and inserts the rows `reserved` whose claim was not refused; and
        shows that this process is alive. What is in both is new and ended already: it is inserted first. The decision
        also says how the workspaces of `looks` stand on their days after all this."""
        try:
            return self._save(reserved, changed, claims, released, looks, _settle_running)
        except _SettledBefore:
            return self._save(reserved, changed, claims, released, looks, _settle)

    def _save(
        self,
        reserved: Sequence[UsageRow],
        changed: Sequence[UsageRow],
        claims: Sequence[Claim],
        released: Sequence[str],
        looks: Iterable[tuple[str, int]],
        settle: Callable[[Connection, Sequence[UsageRow]], None],
    ) -> Decision:
        new, claimed = {row.request_id for row in reserved}, {claim.id for claim in claims}

        def bring_up_to_date(connection: Connection, rows: Sequence[UsageRow]) -> None:
            running = [_changes(row) for row in rows if row.status == "running"]
            if running:
                connection.execute(_CHANGE_RUNNING, running)
            settle(connection, [row for row in rows if row.status != "running"])

        with write(self._database, synchronous="NORMAL") as connection:
            bring_up_to_date(connection, [row for row in changed if row.request_id not in new])
            quotas.release(connection, [claim_id for claim_id in released if claim_id not in claimed])
            decision = quotas.decide(connection, claims, self.process_id)
            accepted = [_inserted(row, self.process_id) for row in reserved if row.request_id not in decision.refused]
            if accepted:
                connection.execute(_INSERT, accepted)
            bring_up_to_date(connection, [row for row in changed if row.request_id in new])
            quotas.release(connection, [claim_id for claim_id in released if claim_id in claimed])
            seen = {workspace: quotas.standing(connection, workspace, day) for workspace, day in looks}
            beat = time.monotonic()
            if beat - self._beat >= BEAT_S:
                self._show_life(connection)
        if beat - self._beat >= BEAT_S:
            self._beat = beat
        return replace(decision, standings={**decision.standings, **seen}) if seen else decision

    def _show_life(self, connection: Connection) -> None:
        now = now_ms()
        beat = {"process_id": self.process_id, "new_heartbeat_at": now}
        if connection.execute(_BEAT, beat).rowcount == 0:
            connection.execute(insert(processes).values(id=self.process_id, started_at=now, heartbeat_at=now))

    def doubt(self) -> None:
        """The store takes no writes: that another process is silent says nothing of it, from now on it must be anew."""
        self._heard = {}

    def settle_dead(self, silence: timedelta) -> int:
        """Settles the running rows of processes without a heartbeat for `silence` as aborted; returns how many.

        One that was only asleep settles its rows again itself, with what they really used.
        """
        with read(self._database) as connection:
            # what belongs to a process that has no heartbeat at all must be somebody's too
            running = select(usage.c.process_id).where(usage.c.status == "running").distinct()
            holding = select(reservations.c.process_id).distinct()
            found = dict.fromkeys(connection.execute(running.union(holding)).scalars(), 0)
            found |= {row.id: row.heartbeat_at for row in connection.execute(select(processes))}
        dead = self._silent(found, silence)
        if not dead:
            return 0
        with write(self._database, synchronous="NORMAL") as connection:
            return _end_processes(connection, dead)

    def forget(self, retention: timedelta, most: int) -> int:
        """Deletes rows of that age, `most` at most; returns how many. Their sums stay."""
        oldest = now_ms() - retention // timedelta(milliseconds=1)
        old = select(usage.c.request_id).where(usage.c.created_at < oldest, usage.c.status != "running")
        with read(self._database) as connection:
            ids = list(connection.execute(old.limit(most)).scalars())
        if ids:
            with write(self._database, synchronous="NORMAL") as connection:
                connection.execute(delete(usage).where(usage.c.request_id.in_(ids)))
        return len(ids)

    def leave(self) -> None:
        """This process ends. Rows that are still running are settled as they are."""
        with write(self._database, synchronous="NORMAL") as connection:
            _end_processes(connection, [self.process_id])

    def _silent(self, found: Mapping[str, int], silence: timedelta) -> list[str]:
        """Which of the processes `found`, with their heartbeats, count as dead.

        By this process's own unswayable clock, or sooner by the wall clock, which a dead process's peers of an earlier
        start need: but never on the word of a clock that has only just jumped.
        """
        now, now_wall = time.monotonic(), now_ms()
        heard = {}
        dead = []
        for process_id, heartbeat in found.items():
            if process_id == self.process_id:
                continue
            before = self._heard.get(process_id)
            since = before[1] if before is not None and before[0] == heartbeat else now
            heard[process_id] = (heartbeat, since)
            still = timedelta(seconds=now - since)
            looks_old = now_wall - heartbeat > silence // timedelta(milliseconds=1)
            if still >= silence or (looks_old and still >= DOUBT):
                dead.append(process_id)
        self._heard = heard
        return dead


class _SettledBefore(Exception):
    """A row that is to be settled does not run, or is not there: the transaction goes back and looks at each."""


def _settle_running(connection: Connection, rows: Sequence[UsageRow]) -> None:
    """Brings rows to their end that all run. Raises `_SettledBefore` where one does not."""
    if rows:
        if connection.execute(_CHANGE_RUNNING, [_changes(row) for row in rows]).rowcount != len(rows):
            raise _SettledBefore
        usage_sums.add(connection, rows)


def _settle(connection: Connection, rows: Sequence[UsageRow]) -> None:
    """Brings rows to their end, whatever they are. One that is not there was never admitted: it is left out."""
    for start in range(0, len(rows), _IDS_AT_ONCE):
        before = _find(connection, [row.request_id for row in rows[start : start + _IDS_AT_ONCE]])
        known = [row for row in rows[start : start + _IDS_AT_ONCE] if row.request_id in before]
        if not known:
            continue
        connection.execute(_CHANGE, [_changes(row) for row in known])
        usage_sums.add(connection, known, instead_of=[row for row in before.values() if row.status != "running"])


def _end_processes(connection: Connection, process_ids: Sequence[str]) -> int:
    """Settles what they left running, with what was last checkpointed; returns how many rows."""
    query = select(usage).where(usage.c.status == "running", usage.c.process_id.in_(process_ids))
    left = [_read(row) for row in connection.execute(query.order_by(usage.c.request_id).with_for_update()).mappings()]
    ids = [row.request_id for row in left]
    for start in range(0, len(ids), _IDS_AT_ONCE):
        orphans = usage.c.request_id.in_(ids[start : start + _IDS_AT_ONCE])
        connection.execute(update(usage).where(orphans).values(status="aborted", ended_at=now_ms()))
    usage_sums.add(connection, left)
    connection.execute(delete(reservations).where(reservations.c.process_id.in_(process_ids)))
    connection.execute(delete(processes).where(processes.c.id.in_(process_ids)))
    return len(ids)


def _find(connection: Connection, request_ids: Sequence[str]) -> dict[str, UsageRow]:
    return {row["request_id"]: _read(row) for row in connection.execute(_FIND, {"ids": request_ids}).mappings()}


# ---------------------------------------------------------------------------------------------- rows and columns


def _inserted(row: UsageRow, process_id: str) -> dict[str, object]:
    return {
        "request_id": row.request_id,
        "message_id": row.message_id,
        "process_id": process_id,
        "workspace_id": row.workspace_id,
        "key_id": row.key_id,
        "model": row.model,
        "status": row.status,
        "input_tokens": row.input_tokens,
        "cache_read_input_tokens": row.cache_read_input_tokens,
        "output_tokens": row.output_tokens,
        "created_at": milliseconds_of(row.created_at),
        "first_token_at": _milliseconds_or_none(row.first_token_at),
        "ended_at": _milliseconds_or_none(row.ended_at),
        "batch": row.batch,
        "cost": row.cost,
    }


def _changes(row: UsageRow) -> dict[str, object]:
    return {
        "row_id": row.request_id,
        "new_status": row.status,
        "new_input_tokens": row.input_tokens,
        "new_cache_read_input_tokens": row.cache_read_input_tokens,
        "new_output_tokens": row.output_tokens,
        "new_cost": row.cost,
        "new_first_token_at": _milliseconds_or_none(row.first_token_at),
        "new_ended_at": _milliseconds_or_none(row.ended_at),
    }


def _read(row: RowMapping) -> UsageRow:
    return UsageRow(
        request_id=row["request_id"],
        message_id=row["message_id"],
        workspace_id=row["workspace_id"],
        key_id=row["key_id"],
        model=row["model"],
        status=row["status"],
        input_tokens=row["input_tokens"],
        cache_read_input_tokens=row["cache_read_input_tokens"],
        output_tokens=row["output_tokens"],
        created_at=datetime.fromtimestamp(row["created_at"] / 1000, UTC),
        batch=row["batch"],
        cost=row["cost"],
    )


def _milliseconds_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else milliseconds_of(moment)
