"""What has been used over days, by model, key or day: read from the sums that the usage rows leave behind.

A query touches one row a day, model, key and kind, so that it is as quick after ten million requests as after ten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Engine, func, literal, select

from aiexport_edge.shim.store.database import read
from aiexport_edge.shim.store.schema import usage_days
from aiexport_edge.shim.store.usage_rows import date_of

GroupBy = Literal["model", "key", "day"]
GROUPS: tuple[GroupBy, ...] = ("model", "key", "day")
_SPLIT = 10**6  # SQLite adds in 64 bits: a sum of costs goes in two halves


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Over one group. `cost` in 1e-12 US dollars; `group` is a model id, a key id or a date."""

    group: str
    requests: int
    input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cost: int


def sums(
    database: Engine, first_day: int, last_day: int, *, workspace_id: str | None = None, group_by: GroupBy | None = None
) -> list[UsageSum]:
    """One sum a group, in the groups' order; without `group_by` one over everything. Both days count (`day_of`).

    `workspace_id` None: of all workspaces together.
    """
    table = usage_days.c
    groups: dict[str, Any] = {"model": table.model, "key": table.key_id, "day": table.day}
    group = literal("") if group_by is None else groups[group_by]
    query = select(
        group,
        func.coalesce(func.sum(table.requests), 0),
        func.coalesce(func.sum(table.input_tokens), 0),
        func.coalesce(func.sum(table.cache_read_input_tokens), 0),
        func.coalesce(func.sum(table.output_tokens), 0),
        func.coalesce(func.sum(table.cost // _SPLIT), 0),
        func.coalesce(func.sum(table.cost % _SPLIT), 0),
    ).where(table.day >= first_day, table.day <= last_day)
    if workspace_id is not None:
        query = query.where(table.workspace_id == workspace_id)
    if group_by is not None:
        query = query.group_by(group).order_by(group)
    with read(database) as connection:
        rows = connection.execute(query).all()
    return [
        UsageSum(
            date_of(name).isoformat() if group_by == "day" else str(name),
            int(requests),
            int(inputs),
            int(cached),
            int(outputs),
            int(high) * _SPLIT + int(low),
        )
        for name, requests, inputs, cached, outputs, high, low in rows
    ]
