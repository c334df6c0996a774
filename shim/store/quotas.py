"""What is used and reserved of a workspace's tokens of a day, in the store.

A quota compares two sums: what the day's settled rows have used (`usage_days`), and what is reserved by requests in
flight (`reservations`). Nothing else is counted anywhere, so nothing can drift; reservations of a dead process go with
it. Claims are decided in the transaction that writes the rows of the requests, so that they cost no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import BindParameter, Connection, Engine, bindparam, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite

from aiexport_edge.shim.store.database import read
from aiexport_edge.shim.store.schema import reservations, usage_days, workspaces

_IDS_AT_ONCE = 1000
_IDS: BindParameter[Any] = bindparam("ids", expanding=True)
_RELEASE = delete(reservations).where(reservations.c.id.in_(_IDS))
_LOCK = select(workspaces.c.id).where(workspaces.c.id == bindparam("workspace")).with_for_update(key_share=True)
_TOKENS = usage_days.c.input_tokens + usage_days.c.cache_read_input_tokens + usage_days.c.output_tokens
_USED = select(func.coalesce(func.sum(_TOKENS), 0)).where(
    usage_days.c.workspace_id == bindparam("workspace"), usage_days.c.day == bindparam("of_day")
)
_RESERVED = select(func.coalesce(func.sum(reservations.c.tokens), 0)).where(
    reservations.c.workspace_id == bindparam("workspace"), reservations.c.day == bindparam("of_day")
)
_STANDING = select(_USED.scalar_subquery(), _RESERVED.scalar_subquery())


def _hold(dialect: Any) -> Any:
    """One that is there already is of an earlier attempt at the same work, whose process has died."""
    new = dialect.insert(reservations)
    return new.on_conflict_do_update(
        index_elements=["id"], set_={name: new.excluded[name] for name in ("process_id", "day", "tokens")}
    )


_HOLD = {"sqlite": _hold(sqlite), "postgresql": _hold(postgresql)}


@dataclass(frozen=True, slots=True)
class Claim:
    """Tokens to be reserved under `id` (the request's) while less than `limit` of the day is used and reserved."""

    id: str
    workspace_id: str
    tokens: int
    limit: int
    day: int


@dataclass(frozen=True, slots=True)
class Standing:
    """A workspace's tokens of a day: `used` by what is settled, `reserved` by what is in flight."""

    day: int
    used: int = 0
    reserved: int = 0


@dataclass(frozen=True, slots=True)
class Decision:
    """What came of the claims: the ids refused, and how each workspace with a claim stands after them."""

    refused: frozenset[str]
    standings: Mapping[str, Standing]


def standing(connection: Connection, workspace_id: str, day: int) -> Standing:
    """How much of a day is used and reserved."""
    row = connection.execute(_STANDING, {"workspace": workspace_id, "of_day": day}).one()
    return Standing(day, int(row[0]), int(row[1]))


def read_standing(database: Engine, workspace_id: str, day: int) -> Standing:
    """`standing` in a transaction of its own."""
    with read(database) as connection:
        return standing(connection, workspace_id, day)


def decide(connection: Connection, claims: Sequence[Claim], process_id: str) -> Decision:
    """A claim is granted while something is left after what is in flight: so the last one may overrun, alone."""
    refused = set()
    standings: dict[str, Standing] = {}
    granted = []
    for claim in sorted(claims, key=lambda claim: (claim.workspace_id, claim.day)):  # stable: else as they came
        now = standings.get(claim.workspace_id)
        if now is None:
            _lock(connection, claim.workspace_id)
        if now is None or now.day != claim.day:
            now = standing(connection, claim.workspace_id, claim.day)
        if now.used + now.reserved < claim.limit:
            granted.append(claim)
            now = replace(now, reserved=now.reserved + claim.tokens)
        else:
            refused.add(claim.id)
        standings[claim.workspace_id] = now
    if granted:
        rows = [
            {
                "id": claim.id,
                "process_id": process_id,
                "workspace_id": claim.workspace_id,
                "day": claim.day,
                "tokens": claim.tokens,
            }
            for claim in granted
        ]
        connection.execute(_HOLD[connection.dialect.name], rows)
    return Decision(frozenset(refused), standings)


def release(connection: Connection, ids: Sequence[str]) -> None:
    for start in range(0, len(ids), _IDS_AT_ONCE):
        connection.execute(_RELEASE, {"ids": ids[start : start + _IDS_AT_ONCE]})


def _lock(connection: Connection, workspace_id: str) -> None:
    """One claim on a workspace's quota at a time. SQLite has one writer anyway."""
    if connection.dialect.name != "sqlite":
        connection.execute(_LOCK, {"workspace": workspace_id})
