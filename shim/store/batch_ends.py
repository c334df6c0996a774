"""How requests of a batch end without a result, and how a batch ends: once, with its webhook's delivery beside it.

Works inside transactions of its callers, which lock the batch's row first; that order keeps them from waiting for each
other in a circle.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, update

from aiexport_edge.shim.store.batch_values import Batch, batch_of
from aiexport_edge.shim.store.database import write
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.rows import milliseconds, now_ms
from aiexport_edge.shim.store.schema import batch_items, batches, webhook_deliveries, workspaces

WEBHOOK_LIFETIME = timedelta(hours=72)

SELECT = select(batches, workspaces.c.name.label("workspace"), workspaces.c.deleted_at.label("workspace_gone")).join(
    workspaces, batches.c.workspace_id == workspaces.c.id
)


def lock(connection: Connection, batch_id: str) -> Any:
    """The batch's row, held until the transaction ends; None where it is gone."""
    query = SELECT.where(batches.c.id == batch_id, batches.c.accepted).with_for_update(of=batches)
    return connection.execute(query).mappings().one_or_none()


def end_queued(connection: Connection, batch_id: str, kind: str) -> int:
    """Whatever is queued of a locked batch ends as `kind`, canceled or expired. Returns how many did."""
    queued = (batch_items.c.batch_id == batch_id) & (batch_items.c.state == "queued")
    ended: int = connection.execute(update(batch_items).where(queued).values(state=kind)).rowcount
    if ended:
        counter = batches.c[f"num_{kind}"]
        connection.execute(update(batches).where(batches.c.id == batch_id).values({counter: counter + ended}))
    return ended


def end_if_done(connection: Connection, batch_id: str) -> Batch | None:
    """Ends a batch of which nothing is queued or processing: the batch, or None where it goes on.

    The webhook's delivery is recorded in the same transaction, unless batch or workspace have been deleted.
    """
    row = lock(connection, batch_id)
    if row is None:
        return None
    batch = batch_of(row)
    if batch.ended_at is not None or batch.num_queued or batch.num_processing:
        return None
    now = now_ms()
    connection.execute(update(batches).where(batches.c.id == batch_id).values(ended_at=now))
    ended = batch_of({**row, "ended_at": now})
    if ended.webhook_url is not None and row["deleted_at"] is None and row["workspace_gone"] is None:
        _record_delivery(connection, ended, ended.webhook_url, now)
    return ended


def end_done(database: Engine, batch_id: str) -> Batch | None:
    """`end_if_done` as a transaction of its own, on disk when it returns: its webhook may be sent then."""
    with write(database) as connection:
        return end_if_done(connection, batch_id)


def _record_delivery(connection: Connection, batch: Batch, url: str, now: int) -> None:
    document = batch.document()
    event = f"batch.{batch.status}"
    payload = {"type": event, "timestamp": document["ended_at"], "data": document}
    connection.execute(
        insert(webhook_deliveries).values(
            id=new_id("evt_"),
            workspace_id=batch.workspace_id,
            batch_id=batch.id,
            url=url,
            type=event,
            payload=json.dumps(payload, separators=(",", ":")).encode(),
            state="pending",
            created_at=now,
            next_at=now,
            give_up_at=now + milliseconds(WEBHOOK_LIFETIME),
            attempts=0,
        )
    )
