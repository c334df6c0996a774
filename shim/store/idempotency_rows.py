"""Idempotency keys in the database: who works on a key, and the reply that it ended with. Synchronous.

A key is unique in its workspace. While its first request runs it is held by a claim, which lives as long as the process
that made it; a final reply is kept until it expires. Knows no HTTP.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from aiexport_edge.shim.store.database import write
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.schema import idempotency, processes
from aiexport_edge.shim.store.store import now_ms

KEPT_MS = timedelta(hours=24) // timedelta(milliseconds=1)
FIRST_BEAT_MS = 15_000  # in which a new process has long shown life for the first time
SWEEP_ROWS = 500  # of those that have expired, in one transaction: others wait to write


class State(StrEnum):
    """What has become of a key's request."""

    RUNNING = "running"
    KEPT = "kept"
    TOO_LARGE = "too_large"  # done, and its reply is more than may be kept


@dataclass(frozen=True, slots=True)
class KeptReply:
    """A final reply: `headers` as JSON, `body` as raw deflate (RFC 1951)."""

    status: int
    headers: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to answer a key's request, until it is kept, released, or its process dies.

    `origin_id` is that of the first claim, where this one takes over from a process that died: what that process may
    have done for good, it has marked with it.
    """

    workspace_id: str
    key: str
    claim_id: str
    origin_id: str


@dataclass(frozen=True, slots=True)
class Taken:
    """Why a key can't be claimed. `reply` is there where the state is KEPT."""

    state: State
    fingerprint: bytes
    reply: KeptReply | None


class IdempotencyRows:
    """The claims of one process. Every method is one transaction; thread-safe."""

    def __init__(self, database: Engine, process_id: str) -> None:
        self._database = database
        self._process_id = process_id

    def claim(self, workspace_id: str, key: str, fingerprint: bytes) -> Claim | Taken:
        """Takes the key, or says who has it. A claim of a dead process, and what has expired, count for nothing."""
        for _ in range(3):
            try:
                return self._claim(workspace_id, key, fingerprint)
            except IntegrityError:  # another process was first; on SQLite this can't happen
                continue
        return Taken(State.RUNNING, fingerprint, None)

    def keep(self, claim: Claim, reply: KeptReply | None) -> None:
        """Ends a claim with its final reply; None where it is too large to be kept."""
        values: dict[str, Any] = {"state": State.TOO_LARGE}
        if reply is not None:
            values = {"state": State.KEPT, "status": reply.status, "headers": reply.headers, "body": reply.body}
        with write(self._database) as connection:
            connection.execute(update(idempotency).where(_is(claim)).values(**values, expires_at=now_ms() + KEPT_MS))

    def release(self, claim: Claim) -> None:
        """Ends a claim without a reply: the key is free again."""
        with write(self._database, synchronous="NORMAL") as connection:
            connection.execute(delete(idempotency).where(_is(claim)))

    def sweep(self, live: Collection[str]) -> int:
        """Deletes what has expired, and claims of this process that are not among `live`; returns how many.

        `SWEEP_ROWS` or more: there may be others.
        """
        now = now_ms()
        columns = (idempotency.c.workspace_id, idempotency.c.key, idempotency.c.claim_id, idempotency.c.origin_id)
        with write(self._database, synchronous="NORMAL") as connection:
            expired = select(*columns).where(idempotency.c.expires_at < now).limit(SWEEP_ROWS)
            rows = [Claim(*row) for row in connection.execute(expired)]
            mine = select(*columns).where(
                idempotency.c.state == State.RUNNING,
                idempotency.c.process_id == self._process_id,
                idempotency.c.created_at < now - FIRST_BEAT_MS,
            )
            rows += [claim for claim in (Claim(*row) for row in connection.execute(mine)) if claim.claim_id not in live]
            for claim in rows:
                connection.execute(delete(idempotency).where(_is(claim)))
        return len(rows)

    def _claim(self, workspace_id: str, key: str, fingerprint: bytes) -> Claim | Taken:
        claim_id = new_id("claim_")
        claim = Claim(workspace_id, key, claim_id, claim_id)
        where = (idempotency.c.workspace_id == workspace_id) & (idempotency.c.key == key)
        with write(self._database, synchronous="NORMAL") as connection:
            row = connection.execute(select(idempotency).where(where).with_for_update()).mappings().one_or_none()
            now = now_ms()
            if row is not None and _holds(connection, row, now):
                reply = None
                if row["state"] == State.KEPT:
                    reply = KeptReply(row["status"], row["headers"], row["body"])
                return Taken(State(row["state"]), row["fingerprint"], reply)
            if row is not None:
                connection.execute(delete(idempotency).where(where))
                if row["state"] == State.RUNNING and row["fingerprint"] == fingerprint:
                    claim = replace(claim, origin_id=row["origin_id"])
            connection.execute(
                insert(idempotency).values(
                    workspace_id=workspace_id,
                    key=key,
                    claim_id=claim.claim_id,
                    origin_id=claim.origin_id,
                    process_id=self._process_id,
                    fingerprint=fingerprint,
                    state=State.RUNNING,
                    created_at=now,
                    expires_at=now + KEPT_MS,
                )
            )
        return claim


def _is(claim: Claim) -> Any:
    """Still this claim: another process may have taken the key since."""
    return (
        (idempotency.c.workspace_id == claim.workspace_id)
        & (idempotency.c.key == claim.key)
        & (idempotency.c.claim_id == claim.claim_id)
        & (idempotency.c.state == State.RUNNING)
    )


def _holds(connection: Connection, row: Any, now: int) -> bool:
    """Whether the row still stands for a kept reply or for a request that runs.

    Whether its process lives is not judged here: one that is dead has been taken out of `processes` (`usage_rows.py`),
    by who knows a process that is silent from a clock that has jumped or a store that took no writes.
    """
    if row["expires_at"] < now:
        return False
    if row["state"] != State.RUNNING:
        return True
    if row["created_at"] > now - FIRST_BEAT_MS:
        return True  # its process may not have had its first heartbeat yet
    return connection.execute(select(processes.c.id).where(processes.c.id == row["process_id"])).first() is not None
