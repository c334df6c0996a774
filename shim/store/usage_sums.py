"""What has been used, summed by day, model, key and kind: brought up to date whenever usage rows are settled.

A query touches these sums alone, so that it is as quick after ten million requests as after ten; they stay when the
rows are deleted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Engine, func, literal, select
from sqlalchemy.dialects import postgresql, sqlite

from aiexport_edge.shim.store.database import read
from aiexport_edge.shim.store.days import date_of, day_of
from aiexport_edge.shim.store.schema import usage_days
from aiexport_edge.shim.store.values import UsageRow

GroupBy = Literal["model", "key", "day"]
GROUPS: tuple[GroupBy, ...] = ("model", "key", "day")
_SUMS = ("requests", "input_tokens", "cache_read_input_tokens", "output_tokens", "cost")
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


# ---------------------------------------------------------------------------------------------- bringing up to date


def _upsert(dialect: Any) -> Any:
    new = dialect.insert(usage_days)
    added = {name: usage_days.c[name] + new.excluded[name] for name in _SUMS}
    return new.on_conflict_do_update(index_elements=list(usage_days.primary_key), set_=added)


_ADD = {"sqlite": _upsert(sqlite), "postgresql": _upsert(postgresql)}


@dataclass(frozen=True, slots=True, order=True)
class _SumKey:
    """A row of `usage_days`; sorted by, so that two processes never wait for each other in a circle."""

    workspace_id: str
    day: int
    model: str
    key_id: str
    batch: bool

    @classmethod
    def of(cls, row: UsageRow) -> _SumKey:
        return cls(row.workspace_id, day_of(row.created_at), row.model, row.key_id, row.batch)

    def columns(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


_Totals = dict[_SumKey, list[int]]


def add(connection: Connection, rows: Iterable[UsageRow], instead_of: Iterable[UsageRow] = ()) -> None:
    """Adds settled rows to their days, in place of what some of them were when they were settled before."""
    totals = _by_key(rows)
    for key, values in _by_key(instead_of).items():
        totals[key] = [new - old for new, old in zip(totals.get(key, [0] * len(_SUMS)), values, strict=True)]
    if totals:
        columns = [key.columns() | dict(zip(_SUMS, totals[key], strict=True)) for key in sorted(totals)]
        connection.execute(_ADD[connection.dialect.name], columns)


def _by_key(rows: Iterable[UsageRow]) -> _Totals:
    """What the rows add to their days. One that never began, or failed unbilled, is no message."""
    totals: _Totals = {}
    for row in rows:
        if row.status == "completed" or row.tokens:
            values = totals.setdefault(_SumKey.of(row), [0] * len(_SUMS))
            new = (1, row.input_tokens, row.cache_read_input_tokens, row.output_tokens, row.cost)
            for place, value in enumerate(new):
                values[place] += value
    return totals
