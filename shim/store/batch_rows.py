"""Batches as their owners see them: made, listed, read, canceled and deleted. Synchronous.

What executes them is `batch_leases.py`. A batch whose requests are still being written is seen by nobody; it becomes
one with the last, synced transaction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import timedelta

from sqlalchemy import ColumnElement, Engine, and_, func, insert, select, tuple_, update

from aiexport_edge.shim.store.batch_ends import SELECT, end_if_done, end_queued, lock
from aiexport_edge.shim.store.batch_values import Batch, NewItem, Result, batch_of
from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.errors import Missing, StoreError
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.rows import milliseconds, now_ms
from aiexport_edge.shim.store.schema import batch_bodies, batch_items, batches, workspaces

LIFETIME = timedelta(hours=24)
_WRITE_ROWS = 1000  # at once: the store's other writers wait for so long
_WRITE_BYTES = 4 << 20
_READ_ROWS = 500
_READ_BYTES = 1 << 20


class BatchRows:
    """A transaction a method, but for `create` and `results`. `workspace_id` None is the operator, who sees all."""

    def __init__(self, database: Engine) -> None:
        self._database = database

    # ------------------------------------------------------------------------------------------ making one

    def create(
        self,
        workspace_id: str,
        key_id: str,
        items: Iterable[NewItem],
        *,
        num_items: int,
        webhook_url: str | None,
        origin_id: str | None = None,
        lifetime: timedelta = LIFETIME,
    ) -> Batch:
        """On disk when it returns. What a process that dies on the way leaves behind is swept up later."""
        batch_id, now = new_id("batch_"), now_ms()
        with write(self._database, synchronous="NORMAL") as connection:
            connection.execute(
                insert(batches).values(
                    id=batch_id,
                    workspace_id=workspace_id,
                    key_id=key_id,
                    accepted=False,
                    origin_id=origin_id,
                    webhook_url=webhook_url,
                    created_at=now,
                    expires_at=now + milliseconds(lifetime),
                    num_total=num_items,
                )
            )
        for group in _groups(items):
            with write(self._database, synchronous="NORMAL") as connection:
                connection.execute(insert(batch_items), [_item_row(batch_id, item) for item in group])
                connection.execute(
                    insert(batch_bodies),
                    [{"batch_id": batch_id, "item_index": item.index, "body": item.body} for item in group],
                )
        mine = batches.c.id == batch_id
        with write(self._database) as connection:  # synchronous: the log up to here is on disk when this has returned
            count = select(func.count()).where(batch_items.c.batch_id == batch_id)
            written = connection.execute(count).scalar_one()
            found = connection.execute(update(batches).where(mine).values(accepted=True)).rowcount
            if written != num_items or not found:
                raise StoreError("The batch was not written whole; send it again.")
            return batch_of(connection.execute(SELECT.where(mine)).mappings().one())

    # ------------------------------------------------------------------------------------------ reading

    def get(self, batch_id: str, workspace_id: str | None) -> Batch:
        """Raises `Missing`."""
        query = SELECT.where(batches.c.id == batch_id, _visible(workspace_id))
        with read(self._database) as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise _missing(batch_id)
        return batch_of(row)

    def made_of(self, origin_id: str) -> Batch | None:
        """The batch that an earlier try with the same Idempotency-Key has made, if it came so far."""
        query = SELECT.where(batches.c.origin_id == origin_id, _visible(None))
        with read(self._database) as connection:
            row = connection.execute(query).mappings().one_or_none()
        return None if row is None else batch_of(row)

    def page(self, workspace_id: str | None, *, limit: int, after_id: str | None = None) -> tuple[list[Batch], bool]:
        """At most `limit` batches after `after_id`, newest first, and whether there are more. Raises `Missing`."""
        place = tuple_(batches.c.created_at, batches.c.id)
        query = SELECT.where(_visible(workspace_id)).order_by(batches.c.created_at.desc(), batches.c.id.desc())
        with read(self._database) as connection:
            if after_id is not None:
                cursor = connection.execute(
                    select(batches.c.created_at, batches.c.id).where(batches.c.id == after_id, _visible(workspace_id))
                ).one_or_none()
                if cursor is None:
                    raise _missing(after_id)
                query = query.where(place < tuple_(*cursor))
            rows = connection.execute(query.limit(limit + 1)).mappings().all()
        return [batch_of(row) for row in rows[:limit]], len(rows) > limit

    def of_workspace(self, name: str | None, *, limit: int) -> list[Batch]:
        """The operator's list, newest first, of one workspace or of all. Raises `Missing`."""
        workspace_id = None
        if name is not None:
            query = select(workspaces.c.id).where(workspaces.c.name == name, workspaces.c.deleted_at.is_(None))
            with read(self._database) as connection:
                workspace_id = connection.execute(query).scalar_one_or_none()
            if workspace_id is None:
                raise Missing(f"There is no workspace named {name}; see: aiexport-edge workspaces list")
        return self.page(workspace_id, limit=limit)[0]

    def results(self, batch_id: str, first: int) -> list[Result]:
        """Results from index `first` on, in order: some, until about `_READ_BYTES`; none at the end or once deleted."""
        sizes = (
            select(batch_items.c.item_index, func.coalesce(func.length(batch_items.c.result), 0))
            .where(batch_items.c.batch_id == batch_id, batch_items.c.item_index >= first)
            .order_by(batch_items.c.item_index)
            .limit(_READ_ROWS)
        )
        with read(self._database) as connection:
            last, total = first - 1, 0
            for index, size in connection.execute(sizes):
                total += size
                if total > _READ_BYTES and last >= first:
                    break
                last = index
            rows = connection.execute(
                select(batch_items.c.item_index, batch_items.c.custom_id, batch_items.c.state, batch_items.c.result)
                .where(batch_items.c.batch_id == batch_id, batch_items.c.item_index.between(first, last))
                .order_by(batch_items.c.item_index)
            )
            return [Result(*row) for row in rows]

    # ------------------------------------------------------------------------------------------ changing

    def cancel(self, batch_id: str, workspace_id: str | None) -> Batch:
        """Nothing of it begins any more; what runs is stopped. One that has ended stays as it is. Raises `Missing`."""
        with write(self._database) as connection:
            row = lock(connection, batch_id)
            if row is None or row["deleted_at"] is not None or workspace_id not in (None, row["workspace_id"]):
                raise _missing(batch_id)
            if row["ended_at"] is None and row["stop"] != "expired":
                connection.execute(update(batches).where(batches.c.id == batch_id).values(stop="cancel"))
                end_queued(connection, batch_id, "canceled")
                end_if_done(connection, batch_id)
            return batch_of(connection.execute(SELECT.where(batches.c.id == batch_id)).mappings().one())

    def delete(self, batch_id: str) -> None:
        """It is gone at once for everybody; nothing of it begins, what runs may finish. Raises `Missing`."""
        with write(self._database) as connection:
            row = lock(connection, batch_id)
            if row is None or row["deleted_at"] is not None:
                raise _missing(batch_id)
            connection.execute(update(batches).where(batches.c.id == batch_id).values(deleted_at=now_ms()))
            end_queued(connection, batch_id, "canceled")
            end_if_done(connection, batch_id)


def _item_row(batch_id: str, item: NewItem) -> dict[str, object]:
    return {
        "batch_id": batch_id,
        "item_index": item.index,
        "custom_id": item.custom_id,
        "model": item.model,
        "body_bytes": len(item.body),
        "state": "queued",
        "attempt": 0,
    }


def _groups(items: Iterable[NewItem]) -> Iterator[list[NewItem]]:
    """The items in the portions in which they are written."""
    rest = iter(items)
    group: list[NewItem] = []
    size = 0
    for item in rest:
        group.append(item)
        size += len(item.body)
        if len(group) == _WRITE_ROWS or size >= _WRITE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _visible(workspace_id: str | None) -> ColumnElement[bool]:
    there = and_(batches.c.accepted, batches.c.deleted_at.is_(None))
    return there if workspace_id is None else and_(there, batches.c.workspace_id == workspace_id)


def _missing(batch_id: str) -> Missing:
    return Missing(f"There is no batch {batch_id}; see: aiexport-edge batches list")
