"""Usage over a span of days as a document: what `GET /v2/usage` answers and the command line prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from typing import Any

from sqlalchemy import Engine

from aiexport_edge.shim.prices import dollars
from aiexport_edge.shim.store.days import date_of, today
from aiexport_edge.shim.store.usage_sums import GroupBy, UsageSum, sums

DEFAULT_DAYS = 30
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)
_EPOCH = date(1970, 1, 1)
_FIRST_DAY = (date.min - _EPOCH).days


class BadPeriod(ValueError):
    """`field` is "start" or "end"; the text reads on after it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(problem)
        self.field = field


@dataclass(frozen=True, slots=True)
class Period:
    """Days of UTC since 1970-01-01, both inclusive."""

    first: int
    last: int

    @classmethod
    def parse(cls, start: str | None, end: str | None) -> Period:
        """From dates as YYYY-MM-DD; what is not given makes it thirty days, up to today. Raises `BadPeriod`."""
        last = today() if end is None else _day(end, "end")
        first = max(last - (DEFAULT_DAYS - 1), _FIRST_DAY) if start is None else _day(start, "start")
        if first > last:
            raise BadPeriod("start", f"must not be after the end, {date_of(last)}")
        return cls(first, last)


def report(
    database: Engine, period: Period, *, workspace_id: str | None = None, group_by: GroupBy | None = None
) -> dict[str, Any]:
    """The document; costs are exact decimals. Without `group_by` it has only the total."""
    found = sums(database, period.first, period.last, workspace_id=workspace_id, group_by=group_by)
    document: dict[str, Any] = {}
    if group_by is not None:
        document["data"] = [{"group": row.group, **_amounts([row])} for row in found]
    return document | {
        "start": date_of(period.first).isoformat(),
        "end": date_of(period.last).isoformat(),
        "total": _amounts(found),
    }


def _amounts(rows: list[UsageSum]) -> dict[str, Any]:
    return {
        "requests": sum(row.requests for row in rows),
        "input_tokens": sum(row.input_tokens for row in rows),
        "cache_read_input_tokens": sum(row.cache_read_input_tokens for row in rows),
        "output_tokens": sum(row.output_tokens for row in rows),
        "cost_usd": dollars(sum(row.cost for row in rows)),
    }


def _day(text: str, field: str) -> int:
    try:
        if not _DATE.fullmatch(text):
            raise ValueError
        return (date.fromisoformat(text) - _EPOCH).days
    except ValueError:
        raise BadPeriod(field, "must be a date such as 2025-04-01") from None
