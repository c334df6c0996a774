"""Who works on which request of a batch, and what came of it. Used by every shim process; synchronous.

A request is leased to a process, which is alive for as long as it is in `processes` (`usage_rows.py` takes out whoever
falls silent); the requests of a dead one are queued again. A result counts only where the lease is still the one it was
made under (owner and attempt), and comes with its usage row and the batch's counts in one transaction: each request is
answered and billed once.

    queued ──lease──▶ processing ──answer──▶ succeeded, errored (or canceled, expired)
       ▲                  │
       └── release, dead ─┘

Every transaction locks the batch's row before it touches the items, so that no two wait for each other in a circle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, bindparam, select, update

from aiexport_edge.shim.store import batch_ends
from aiexport_edge.shim.store.batch_values import Answer, Leased
from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.rows import now_ms
from aiexport_edge.shim.store.schema import batch_bodies, batch_items, batches, processes, usage, workspaces
from aiexport_edge.shim.store.values import Principal, UsageRow

_OPEN = batches.c.accepted & batches.c.ended_at.is_(None) & batches.c.stop.is_(None) & batches.c.deleted_at.is_(None)
_NUM_ENDED = batches.c.num_succeeded + batches.c.num_errored + batches.c.num_canceled + batches.c.num_expired
_HAS_QUEUED = batches.c.num_total > batches.c.num_processing + _NUM_ENDED
_MAX_CANDIDATES = 1000

_ANSWER = (
    update(batch_items)
    .where(
        batch_items.c.batch_id == bindparam("of_batch"),
        batch_items.c.item_index == bindparam("at_index"),
        batch_items.c.owner == bindparam("under_owner"),
        batch_items.c.attempt == bindparam("under_attempt"),
        batch_items.c.state == "processing",
    )
    .values(state=bindparam("new_state"), result=bindparam("new_result"), owner=None)
)

RecordUsage = Callable[[Connection, Sequence[UsageRow]], None]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A batch of which something is queued, for whoever decides whose turn it is."""

    batch_id: str
    workspace_id: str
    plan: str


class BatchLeases:
    """One process's. `record_usage` writes usage rows inside the transaction that it is given."""

    def __init__(self, database: Engine, process_id: str, record_usage: RecordUsage) -> None:
        self._database = database
        self._process_id = process_id
        self._record_usage = record_usage

    # ------------------------------------------------------------------------------------------ taking

    def waiting(self) -> list[Waiting]:
        """Batches of which something can begin, oldest first."""
        query = (
            select(batches.c.id, batches.c.workspace_id, workspaces.c.plan)
            .join(workspaces, batches.c.workspace_id == workspaces.c.id)
            .where(_OPEN, _HAS_QUEUED, batches.c.expires_at > now_ms(), workspaces.c.deleted_at.is_(None))
            .order_by(batches.c.created_at, batches.c.id)
            .limit(_MAX_CANDIDATES)
        )
        with read(self._database) as connection:
            return [Waiting(*row) for row in connection.execute(query)]

    def lease(
        self, batch_id: str, *, num_items: int, num_bytes: int, without_models: Collection[str] = ()
    ) -> list[Leased]:
        """At most `num_items` queued requests of the batch, the first ones, of about `num_bytes` of bodies together.

        At least one where there is one for a model that is not in `without_models`.
        """
        with write(self._database, synchronous="NORMAL") as connection:
            locked = batch_ends.lock(connection, batch_id)
            if locked is None or any(locked[name] is not None for name in ("stop", "ended_at", "deleted_at")):
                return []
            me = select(processes.c.id).where(processes.c.id == self._process_id)
            if connection.execute(me).first() is None:  # counted as dead: the lease would not hold
                return []
            chosen = self._choose(connection, batch_id, num_items, num_bytes, without_models)
            if not chosen:
                return []
            indices = [row.item_index for row in chosen]
            connection.execute(
                update(batch_items)
                .where(batch_items.c.batch_id == batch_id, batch_items.c.item_index.in_(indices))
                .values(state="processing", owner=self._process_id, attempt=batch_items.c.attempt + 1)
            )
            connection.execute(
                update(batches)
                .where(batches.c.id == batch_id)
                .values(
                    num_processing=batches.c.num_processing + len(chosen), started_at=locked["started_at"] or now_ms()
                )
            )
            bodies = self._bodies(connection, batch_id, indices)
            principal = _principal(connection, locked)
        return [
            Leased(batch_id, row.item_index, row.attempt + 1, row.model, bodies[row.item_index], principal)
            for row in chosen
        ]

    def _choose(
        self,
        connection: Connection,
        batch_id: str,
        num_items: int,
        num_bytes: int,
        without_models: Collection[str],
    ) -> list[Any]:
        queued = (
            select(batch_items.c.item_index, batch_items.c.attempt, batch_items.c.model, batch_items.c.body_bytes)
            .where(batch_items.c.batch_id == batch_id, batch_items.c.state == "queued")
            .order_by(batch_items.c.item_index)
            .limit(num_items)
        )
        if without_models:
            queued = queued.where(batch_items.c.model.not_in(sorted(without_models)))
        chosen: list[Any] = []
        for row in connection.execute(queued):
            num_bytes -= row.body_bytes
            if chosen and num_bytes < 0:
                break
            chosen.append(row)
        return chosen

    def _bodies(self, connection: Connection, batch_id: str, indices: Sequence[int]) -> dict[int, bytes]:
        query = select(batch_bodies.c.item_index, batch_bodies.c.body).where(
            batch_bodies.c.batch_id == batch_id, batch_bodies.c.item_index.in_(indices)
        )
        return {row.item_index: row.body for row in connection.execute(query)}

    # ------------------------------------------------------------------------------------------ giving back

    def answer(self, answers: Sequence[Answer]) -> list[Answer]:
        """Writes results with their usage and counts, in one transaction; returns those that counted. One that is
        "queued" gives its request back.

        The others' leases had been lost meanwhile; whoever has them now answers, and is billed.
        """
        counted: list[Answer] = []
        by_batch: dict[str, list[Answer]] = defaultdict(list)
        for answer in answers:
            by_batch[answer.leased.batch_id].append(answer)
        with write(self._database, synchronous="NORMAL") as connection:
            for batch_id in sorted(by_batch):
                if batch_ends.lock(connection, batch_id) is None:
                    continue
                here = [answer for answer in by_batch[batch_id] if self._write(connection, answer)]
                if here:
                    self._count(connection, batch_id, [answer.state for answer in here])
                    counted += here
            used = [answer.usage for answer in counted if answer.usage is not None]
            if used:
                self._record_usage(connection, used)
        for batch_id in sorted({answer.leased.batch_id for answer in counted}):
            self._end(batch_id)
        return counted

    def _write(self, connection: Connection, answer: Answer) -> bool:
        leased = answer.leased
        values = {
            "of_batch": leased.batch_id,
            "at_index": leased.index,
            "under_owner": self._process_id,
            "under_attempt": leased.attempt,
            "new_state": answer.state,
            "new_result": answer.body,
        }
        return connection.execute(_ANSWER, values).rowcount == 1

    def _count(self, connection: Connection, batch_id: str, states: Sequence[str]) -> None:
        changes: dict[Any, Any] = {batches.c.num_processing: batches.c.num_processing - len(states)}
        for kind in set(states) - {"queued"}:
            counter = batches.c[f"num_{kind}"]
            changes[counter] = counter + states.count(kind)
        connection.execute(update(batches).where(batches.c.id == batch_id).values(changes))

    def _end(self, batch_id: str) -> None:
        query = select(batches.c.id).where(
            batches.c.id == batch_id, batches.c.ended_at.is_(None), batches.c.num_total == _NUM_ENDED
        )
        with read(self._database) as connection:
            done = connection.execute(query).first() is not None
        if done:
            batch_ends.end_done(self._database, batch_id)

    # ------------------------------------------------------------------------------------------ who is alive, who stops

    def to_abort(self, batch_ids: Collection[str]) -> dict[str, str]:
        """Of these batches the ones whose running requests are to end, and as what: canceled or expired."""
        query = select(batches.c.id, batches.c.stop).where(
            batches.c.id.in_(sorted(batch_ids)), batches.c.stop.in_(("cancel", "expired"))
        )
        with read(self._database) as connection:
            stopped = connection.execute(query).all()
        return {batch_id: "canceled" if stop == "cancel" else "expired" for batch_id, stop in stopped}

    def interactive(self) -> bool:
        """Whether any interactive request is in flight, at any shim."""
        with read(self._database) as connection:
            running = select(usage.c.request_id).where(usage.c.status == "running").limit(1)
            return connection.execute(running).first() is not None

    def requeue_dead(self) -> int:
        """Queues the requests again of processes that have been found dead; returns how many."""
        dead = batch_items.c.owner.is_not(None) & batch_items.c.owner.not_in(select(processes.c.id))
        query = select(batch_items.c.batch_id).where(dead).distinct()
        with read(self._database) as connection:
            orphaned = connection.execute(query).scalars().all()
        back = 0
        for batch_id in orphaned:
            with write(self._database, synchronous="NORMAL") as connection:
                if batch_ends.lock(connection, batch_id) is None:
                    continue
                num_items: int = connection.execute(
                    update(batch_items)
                    .where(batch_items.c.batch_id == batch_id, batch_items.c.state == "processing", dead)
                    .values(state="queued", owner=None)
                ).rowcount
                self._count(connection, batch_id, ["queued"] * num_items)
                back += num_items
        return back


def _principal(connection: Connection, batch: Any) -> Principal:
    """Whose a batch is, as the workspace is now; its credential is not presented again."""
    row = connection.execute(select(workspaces).where(workspaces.c.id == batch["workspace_id"])).mappings().one()
    return Principal(
        kind="key",
        key_id=batch["key_id"],
        digest=b"",
        workspace_id=row["id"],
        workspace=row["name"],
        plan=row["plan"],
        cache_salt=row["cache_salt"],
        scopes=frozenset(("batch",)),
        expires_at=None,
        test=False,
        requests_per_minute=row["requests_per_minute"],
        tokens_per_day=row["tokens_per_day"],
    )
