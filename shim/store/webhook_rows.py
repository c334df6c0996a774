"""Webhooks in the database: the secrets they are signed with, and what is to be delivered. Synchronous.

A delivery is recorded by the transaction that ends its batch (`batch_ends.py`). Whoever tries it first moves its next
time ahead, so that no other process tries it meanwhile, and one that dies on the way is followed by another later.
"""

from __future__ import annotations

import secrets
from base64 import b64encode
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, delete, insert, or_, select, update

from aiexport_edge.shim.store.batch_ends import WEBHOOK_LIFETIME
from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.errors import Missing
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.rows import milliseconds, now_ms, time_of, time_or_none
from aiexport_edge.shim.store.schema import webhook_deliveries, webhook_secrets, workspaces

if TYPE_CHECKING:
    from aiexport_edge.shim.secrets import SecretBox

PURPOSE = "webhook secret"
GRACE = timedelta(hours=24)  # in which a rotated secret still signs beside the new one
_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Delivery:
    """What is to be sent, and how far that is. `state` is pending, delivered or dead."""

    id: str
    workspace: str
    batch_id: str
    url: str
    type: str
    state: str
    attempts: int
    created_at: datetime
    next_at: datetime | None  # None unless pending
    give_up_at: datetime
    ended_at: datetime | None
    last_status: int | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery that this process has to try now, for the `attempt`th time."""

    id: str
    workspace_id: str
    url: str
    payload: bytes
    attempt: int
    give_up_at: datetime


class WebhookRows:
    """Every method is a transaction. Those that read secrets may raise `SecretError`."""

    def __init__(self, database: Engine, box: SecretBox) -> None:
        self._database = database
        self._box = box

    # ------------------------------------------------------------------------------------------ secrets

    def secret(self, workspace: str, *, rotate: bool = False) -> str:
        """The workspace's current secret; the first one is made here. Raises `Missing`.

        With `rotate` a new one, beside which the old one signs for `GRACE`.
        """
        query = select(workspaces.c.id).where(workspaces.c.name == workspace, workspaces.c.deleted_at.is_(None))
        with write(self._database) as connection:
            workspace_id = connection.execute(query).scalar_one_or_none()
            if workspace_id is None:
                raise Missing(f"There is no workspace named {workspace}; see: aiexport-edge workspaces list")
            return self._secrets(connection, workspace_id, rotate=rotate)[0]

    def signing_secrets(self, workspace_id: str) -> list[str]:
        """What a delivery is signed with now, the newest first; the first one is made here."""
        with read(self._database) as connection:
            sealed = _sealed(connection, workspace_id)
        if sealed:
            return [self._open(each) for each in sealed]
        with write(self._database) as connection:
            return self._secrets(connection, workspace_id, rotate=False)

    def _secrets(self, connection: Connection, workspace_id: str, *, rotate: bool) -> list[str]:
        lock = select(workspaces.c.id).where(workspaces.c.id == workspace_id).with_for_update()
        connection.execute(lock)  # of two processes one makes the first secret
        sealed = _sealed(connection, workspace_id)
        if rotate or not sealed:
            now = now_ms()
            current = (webhook_secrets.c.workspace_id == workspace_id) & webhook_secrets.c.retires_at.is_(None)
            connection.execute(update(webhook_secrets).where(current).values(retires_at=now + milliseconds(GRACE)))
            new = "whsec_" + b64encode(secrets.token_bytes(32)).decode("ascii")
            sealed = [self._box.seal(new.encode("ascii"), purpose=PURPOSE), *sealed]
            connection.execute(
                insert(webhook_secrets).values(
                    id=new_id("whs_"), workspace_id=workspace_id, sealed=sealed[0], created_at=now
                )
            )
        return [self._open(each) for each in sealed]

    def _open(self, sealed: bytes) -> str:
        return self._box.open(sealed, purpose=PURPOSE).decode("ascii")

    # ------------------------------------------------------------------------------------------ deliveries

    def take_due(self, limit: int, *, hold: timedelta, busy: Collection[str] = ()) -> list[Due]:
        """At most `limit` deliveries whose time has come, of workspaces that are not `busy`. No process tries them
        again for `hold`, unless this one says sooner what came of them."""
        now = now_ms()
        query = (
            select(webhook_deliveries)
            .where(webhook_deliveries.c.state == "pending", webhook_deliveries.c.next_at <= now)
            .order_by(webhook_deliveries.c.next_at)
            .limit(limit)
        )
        if busy:
            query = query.where(webhook_deliveries.c.workspace_id.not_in(sorted(busy)))
        with read(self._database) as connection:
            found = connection.execute(query).mappings().all()
        if not found:
            return []
        taken = []
        with write(self._database, synchronous="NORMAL") as connection:
            for row in found:
                as_seen = (webhook_deliveries.c.id == row["id"]) & (webhook_deliveries.c.next_at == row["next_at"])
                held = update(webhook_deliveries).where(as_seen, webhook_deliveries.c.state == "pending")
                values = {"next_at": now + milliseconds(hold), "attempts": row["attempts"] + 1}
                if connection.execute(held.values(values)).rowcount:
                    taken.append(
                        Due(
                            row["id"],
                            row["workspace_id"],
                            row["url"],
                            row["payload"],
                            row["attempts"] + 1,
                            time_of(row["give_up_at"]),
                        )
                    )
        return taken

    def delivered(self, due: Due, status: int) -> None:
        self._settle(due, state="delivered", ended_at=now_ms(), last_status=status, last_error=None)

    def failed(self, due: Due, status: int | None, error: str, next_at: datetime | None) -> None:
        """`next_at` None: there will be no further try."""
        said = {"last_status": status, "last_error": error[:_MAX_ERROR_CHARS]}
        if next_at is None:
            self._settle(due, state="dead", ended_at=now_ms(), **said)
        else:
            self._settle(due, next_at=round(next_at.timestamp() * 1000), **said)

    def _settle(self, due: Due, **values: Any) -> None:
        """Unless somebody has tried it again since, or the operator has had it tried anew."""
        mine = (webhook_deliveries.c.id == due.id) & (webhook_deliveries.c.attempts == due.attempt)
        with write(self._database, synchronous="NORMAL") as connection:
            connection.execute(
                update(webhook_deliveries).where(mine, webhook_deliveries.c.state == "pending").values(**values)
            )

    # ------------------------------------------------------------------------------------------ the operator's

    def deliveries(self, *, dead: bool = False, limit: int = 1000) -> list[Delivery]:
        """Newest first; with `dead` those alone that were given up."""
        query = (
            select(webhook_deliveries, workspaces.c.name.label("workspace"))
            .join(workspaces, webhook_deliveries.c.workspace_id == workspaces.c.id)
            .order_by(webhook_deliveries.c.created_at.desc(), webhook_deliveries.c.id.desc())
            .limit(limit)
        )
        if dead:
            query = query.where(webhook_deliveries.c.state == "dead")
        with read(self._database) as connection:
            return [_delivery(row) for row in connection.execute(query).mappings()]

    def redeliver(self, delivery_id: str) -> None:
        """Sends it again, at once and for another 72 hours, under the same id. Raises `Missing`."""
        now = now_ms()
        this = update(webhook_deliveries).where(webhook_deliveries.c.id == delivery_id)
        values = {
            "state": "pending",
            "next_at": now,
            "give_up_at": now + milliseconds(WEBHOOK_LIFETIME),
            "attempts": 0,
            "ended_at": None,
        }
        with write(self._database) as connection:
            if not connection.execute(this.values(values)).rowcount:
                raise Missing(f"There is no delivery {delivery_id}; see: aiexport-edge webhooks list")

    def forget(self, retention: timedelta) -> None:
        """Deletes settled deliveries older than that, and secrets that sign nothing any more."""
        now = now_ms()
        old = webhook_deliveries.c.ended_at <= now - milliseconds(retention)
        with write(self._database, synchronous="NORMAL") as connection:
            connection.execute(delete(webhook_deliveries).where(old, webhook_deliveries.c.state != "pending"))
            connection.execute(delete(webhook_secrets).where(webhook_secrets.c.retires_at <= now))


def _sealed(connection: Connection, workspace_id: str) -> list[bytes]:
    alive = or_(webhook_secrets.c.retires_at.is_(None), webhook_secrets.c.retires_at > now_ms())
    query = (
        select(webhook_secrets.c.sealed)
        .where(webhook_secrets.c.workspace_id == workspace_id, alive)
        .order_by(webhook_secrets.c.created_at.desc(), webhook_secrets.c.retires_at.is_not(None))
    )
    return list(connection.execute(query).scalars())


def _delivery(row: Any) -> Delivery:
    return Delivery(
        id=row["id"],
        workspace=row["workspace"],
        batch_id=row["batch_id"],
        url=row["url"],
        type=row["type"],
        state=row["state"],
        attempts=row["attempts"],
        created_at=time_of(row["created_at"]),
        next_at=time_of(row["next_at"]) if row["state"] == "pending" else None,
        give_up_at=time_of(row["give_up_at"]),
        ended_at=time_or_none(row["ended_at"]),
        last_status=row["last_status"],
        last_error=row["last_error"],
    )
