"""Usage rows in the database, written in batches by one thread a process (`shim/usage.py`).

A row is written `running` when a request is admitted, and settled at its end. The rows of a process that died are
settled by another with what was last checkpointed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Engine, bindparam, delete, insert, select, update

from aiexport_edge.shim.store.database import write
from aiexport_edge.shim.store.schema import processes, usage
from aiexport_edge.shim.store.store import now_ms
from aiexport_edge.shim.store.values import UsageRow

_SETTLE = (
    update(usage)
    .where(usage.c.request_id == bindparam("row_id"))
    .values(
        {
            name: bindparam(f"new_{name}")
            for name in (
                "status",
                "input_tokens",
                "cache_read_input_tokens",
                "output_tokens",
                "first_token_at",
                "ended_at",
            )
        }
    )
)


class UsageRows:
    """The rows of one process. `process_id` names it; not thread-safe, one thread owns it."""

    def __init__(self, database: Engine, process_id: str) -> None:
        self._database = database
        self.process_id = process_id

    def save(self, reserved: Sequence[UsageRow], changed: Sequence[UsageRow]) -> None:
        """One transaction: inserts `reserved`, brings `changed` up to date, and shows that this process is alive."""
        with write(self._database, synchronous="NORMAL") as connection:
            if reserved:
                connection.execute(insert(usage), [self._inserted(row) for row in reserved])
            if changed:
                connection.execute(_SETTLE, [_changes(row) for row in changed])
            now = now_ms()
            beat = update(processes).where(processes.c.id == self.process_id).values(heartbeat_at=now)
            if connection.execute(beat).rowcount == 0:
                connection.execute(insert(processes).values(id=self.process_id, started_at=now, heartbeat_at=now))

    def settle_dead(self, silence: timedelta) -> int:
        """Settles the running rows of processes without a heartbeat for `silence` as aborted; returns how many.

        One that was only asleep writes its rows again when it settles them itself.
        """
        with write(self._database, synchronous="NORMAL") as connection:
            latest = now_ms() - silence // timedelta(milliseconds=1)
            dead = [
                row.id
                for row in connection.execute(
                    select(processes.c.id).where(processes.c.heartbeat_at < latest, processes.c.id != self.process_id)
                )
            ]
            if not dead:
                return 0
            orphans = (usage.c.status == "running") & usage.c.process_id.in_(dead)
            settled = connection.execute(update(usage).where(orphans).values(status="aborted", ended_at=now_ms()))
            connection.execute(delete(processes).where(processes.c.id.in_(dead)))
            return settled.rowcount

    def leave(self) -> None:
        """This process ends. Rows that are still running are settled as they are."""
        with write(self._database, synchronous="NORMAL") as connection:
            left = (usage.c.status == "running") & (usage.c.process_id == self.process_id)
            connection.execute(update(usage).where(left).values(status="aborted", ended_at=now_ms()))
            connection.execute(delete(processes).where(processes.c.id == self.process_id))

    def _inserted(self, row: UsageRow) -> dict[str, object]:
        return {
            "request_id": row.request_id,
            "message_id": row.message_id,
            "process_id": self.process_id,
            "workspace_id": row.workspace_id,
            "key_id": row.key_id,
            "model": row.model,
            "status": row.status,
            "input_tokens": row.input_tokens,
            "cache_read_input_tokens": row.cache_read_input_tokens,
            "output_tokens": row.output_tokens,
            "created_at": _milliseconds(row.created_at),
            "first_token_at": _milliseconds(row.first_token_at),
            "ended_at": _milliseconds(row.ended_at),
        }


def _changes(row: UsageRow) -> dict[str, object]:
    return {
        "row_id": row.request_id,
        "new_status": row.status,
        "new_input_tokens": row.input_tokens,
        "new_cache_read_input_tokens": row.cache_read_input_tokens,
        "new_output_tokens": row.output_tokens,
        "new_first_token_at": _milliseconds(row.first_token_at),
        "new_ended_at": _milliseconds(row.ended_at),
    }


def _milliseconds(time: datetime | None) -> int | None:
    return None if time is None else round(time.timestamp() * 1000)
