"""What the operator's console shows of the store: all workspaces at a glance, and one with its keys. Synchronous.

Every number comes from an index or from the daily sums, so that a large store is as quick to look at as a small one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, and_, func, or_, select

from aiexport_edge.shim.store.database import read
from aiexport_edge.shim.store.days import date_of, today
from aiexport_edge.shim.store.errors import Missing
from aiexport_edge.shim.store.key_rows import key_of
from aiexport_edge.shim.store.rows import now_ms
from aiexport_edge.shim.store.schema import (
    batches,
    keys,
    oauth_clients,
    usage,
    usage_days,
    webhook_deliveries,
    workspaces,
)
from aiexport_edge.shim.store.values import Key

MONTH_DAYS = 30
MAX_KEYS = 200  # of one workspace that are shown
_COST_UNIT = 10**6  # sums are of whole microdollars: SQLite adds in 64 bits


@dataclass(frozen=True, slots=True)
class Amount:
    """What has been used; `cost` in US dollars."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkspaceOverview:
    """One workspace. Limits are its own: None is the plan's, 0 none."""

    id: str
    name: str
    plan: str
    requests_per_minute: int | None
    tokens_per_day: int | None
    num_keys: int  # that have not ended
    num_clients: int
    num_running: int  # message requests, batches' too
    num_open_batches: int
    num_dead_webhooks: int
    today: Amount
    month: Amount


@dataclass(frozen=True, slots=True)
class KeyOverview:
    """A key, the last day on which it was used, and what it has used in a month."""

    key: Key
    last_used: date | None
    month: Amount


class Overview:
    """Each method is one consistent view."""

    def __init__(self, database: Engine) -> None:
        self._database = database

    def workspaces(self) -> list[WorkspaceOverview]:
        """Those that used most today first, then by name."""
        with read(self._database) as connection:
            found = _workspaces(connection, workspaces.c.deleted_at.is_(None))
        return sorted(found, key=lambda each: (-each.today.tokens, -each.month.tokens, each.name))

    def workspace(self, name: str) -> tuple[WorkspaceOverview, list[KeyOverview]]:
        """One workspace and its newest keys, ended ones too. Raises `Missing`."""
        with read(self._database) as connection:
            found = _workspaces(connection, and_(workspaces.c.name == name, workspaces.c.deleted_at.is_(None)))
            if not found:
                raise Missing(f"There is no workspace named {name}.")
            of_keys = _month_by_key(connection, found[0].id)
            query = (
                select(keys)
                .where(keys.c.workspace_id == found[0].id)
                .order_by(keys.c.created_at.desc(), keys.c.id.desc())
                .limit(MAX_KEYS)
            )
            shown = [key_of(row, name) for row in connection.execute(query).mappings()]
        nothing = (None, Amount())
        return found[0], [KeyOverview(key, *of_keys.get(key.key_id, nothing)) for key in shown]


def _workspaces(connection: Connection, condition: ColumnElement[bool]) -> list[WorkspaceOverview]:
    rows = connection.execute(select(workspaces).where(condition)).mappings().all()
    now = now_ms()
    alive = and_(keys.c.revoked_at.is_(None), or_(keys.c.expires_at.is_(None), keys.c.expires_at > now))
    counts = {
        "num_keys": _count(connection, keys.c.workspace_id, alive),
        "num_clients": _count(connection, oauth_clients.c.workspace_id, oauth_clients.c.revoked_at.is_(None)),
        "num_running": _count(connection, usage.c.workspace_id, usage.c.status == "running"),
        "num_open_batches": _count(
            connection,
            batches.c.workspace_id,
            and_(batches.c.ended_at.is_(None), batches.c.deleted_at.is_(None), batches.c.accepted),
        ),
        "num_dead_webhooks": _count(
            connection, webhook_deliveries.c.workspace_id, webhook_deliveries.c.state == "dead"
        ),
    }
    day = today()
    of_today = _amounts(connection, usage_days.c.day == day)
    of_month = _amounts(connection, usage_days.c.day > day - MONTH_DAYS)
    return [
        WorkspaceOverview(
            id=row["id"],
            name=row["name"],
            plan=row["plan"],
            requests_per_minute=row["requests_per_minute"],
            tokens_per_day=row["tokens_per_day"],
            today=of_today.get(row["id"], Amount()),
            month=of_month.get(row["id"], Amount()),
            **{name: count.get(row["id"], 0) for name, count in counts.items()},
        )
        for row in rows
    ]


def _count(connection: Connection, workspace_id: Any, condition: ColumnElement[bool]) -> Mapping[str, int]:
    query = select(workspace_id, func.count()).where(condition).group_by(workspace_id)
    return {str(name): int(count) for name, count in connection.execute(query)}


_SUMS = (
    func.sum(usage_days.c.requests),
    func.sum(usage_days.c.input_tokens + usage_days.c.cache_read_input_tokens + usage_days.c.output_tokens),
    func.sum(usage_days.c.cost // _COST_UNIT),
)


def _amount(requests: Any, tokens: Any, microdollars: Any) -> Amount:
    return Amount(int(requests), int(tokens), int(microdollars) / 1e6)


def _amounts(connection: Connection, condition: ColumnElement[bool]) -> dict[str, Amount]:
    column = usage_days.c.workspace_id
    query = select(column, *_SUMS).where(condition).group_by(column)
    return {str(name): _amount(*sums) for name, *sums in connection.execute(query)}


def _month_by_key(connection: Connection, workspace_id: str) -> dict[str, tuple[date, Amount]]:
    query = (
        select(usage_days.c.key_id, func.max(usage_days.c.day), *_SUMS)
        .where(usage_days.c.workspace_id == workspace_id, usage_days.c.day > today() - MONTH_DAYS)
        .group_by(usage_days.c.key_id)
    )
    return {str(key): (date_of(day), _amount(*sums)) for key, day, *sums in connection.execute(query)}
