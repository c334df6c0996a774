"""What becomes of batches with time: they expire, their owner goes, they are deleted. Any process may do it.

Everything here can be done twice without harm. Deleting goes in small transactions: other writers wait for each.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, and_, delete, exists, func, or_, select, update

from aiexport_edge.shim.store import batch_ends
from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.rows import milliseconds, now_ms
from aiexport_edge.shim.store.schema import batch_bodies, batch_items, batches, keys, oauth_clients, workspaces

ABANDONED = timedelta(hours=1)  # in which any batch is written; a later one will not come
_DELETED_ROWS = 500

_UNENDED = batches.c.accepted & batches.c.ended_at.is_(None)
_NUM_ENDED = batches.c.num_succeeded + batches.c.num_errored + batches.c.num_canceled + batches.c.num_expired
_OWNER_GONE = or_(
    exists().where(workspaces.c.id == batches.c.workspace_id, workspaces.c.deleted_at.is_not(None)),
    exists().where(keys.c.id == batches.c.key_id, keys.c.revoked_at.is_not(None)),
    exists().where(oauth_clients.c.id == batches.c.key_id, oauth_clients.c.revoked_at.is_not(None)),
)


def stop(database: Engine) -> None:
    """Batches past their time expire; of those whose workspace or key is gone nothing more begins."""
    now = now_ms()
    with read(database) as connection:
        expired = _ids(connection, _UNENDED, batches.c.stop.is_(None), batches.c.expires_at <= now)
        revoked = _ids(connection, _UNENDED, batches.c.stop.is_(None), _OWNER_GONE)
        stopped = _ids(
            connection,
            _UNENDED,
            or_(batches.c.stop.is_not(None), batches.c.deleted_at.is_not(None)),
            batches.c.num_total > _NUM_ENDED + batches.c.num_processing,  # given back by a process that died
        )
        done = _ids(connection, _UNENDED, batches.c.num_total == _NUM_ENDED)
    for batch_id in revoked:
        _stop(database, batch_id, "revoked")
    for batch_id in expired:
        _stop(database, batch_id, "expired")
    for batch_id in stopped:
        _stop(database, batch_id, None)
    for batch_id in done:  # its last answer came from a process that died just then
        batch_ends.end_done(database, batch_id)


def forget(database: Engine, retention: timedelta) -> None:
    """Deletes what nobody needs: bodies of ended batches, batches past their retention or deleted, and halves."""
    now = now_ms()
    ended = batches.c.ended_at.is_not(None)
    with read(database) as connection:
        has_bodies = exists().where(batch_bodies.c.batch_id == batches.c.id)
        ended_ids = _ids(connection, ended, has_bodies)
        gone = _ids(
            connection,
            or_(
                and_(ended, batches.c.ended_at <= now - milliseconds(retention)),
                and_(ended, batches.c.deleted_at.is_not(None)),
                and_(~batches.c.accepted, batches.c.created_at <= now - milliseconds(ABANDONED)),
            ),
        )
    for batch_id in ended_ids:
        _delete_all(database, batch_bodies, batch_id)
    for batch_id in gone:
        with write(database, synchronous="NORMAL") as connection:  # from here on nobody sees half of it
            connection.execute(
                update(batches)
                .where(batches.c.id == batch_id)
                .values(deleted_at=func.coalesce(batches.c.deleted_at, now))
            )
        _delete_all(database, batch_bodies, batch_id)
        _delete_all(database, batch_items, batch_id)
        with write(database, synchronous="NORMAL") as connection:
            connection.execute(delete(batches).where(batches.c.id == batch_id))


def _stop(database: Engine, batch_id: str, why: str | None) -> None:
    with write(database) as connection:
        row = batch_ends.lock(connection, batch_id)
        if row is None or row["ended_at"] is not None:
            return
        reason = row["stop"] or why
        connection.execute(update(batches).where(batches.c.id == batch_id).values(stop=reason))
        batch_ends.end_queued(connection, batch_id, "expired" if reason == "expired" else "canceled")
        batch_ends.end_if_done(connection, batch_id)


def _delete_all(database: Engine, table: Any, batch_id: str) -> None:
    """The batch's rows of `table`, some at a time."""
    more = True
    while more:
        with write(database, synchronous="NORMAL") as connection:
            some = select(table.c.item_index).where(table.c.batch_id == batch_id).limit(_DELETED_ROWS)
            indices = connection.execute(some).scalars().all()
            more = len(indices) == _DELETED_ROWS
            connection.execute(delete(table).where(table.c.batch_id == batch_id, table.c.item_index.in_(indices)))


def _ids(connection: Any, *conditions: Any) -> list[str]:
    return list(connection.execute(select(batches.c.id).where(*conditions).limit(1000)).scalars())
