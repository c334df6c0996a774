"""Days of UTC as the store counts them: whole numbers since 1970-01-01, by the wall clock."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

DAY_MS = 86_400_000


def day_of(moment: datetime) -> int:
    return milliseconds_of(moment) // DAY_MS


def date_of(day: int) -> date:
    return date(1970, 1, 1) + timedelta(days=day)


def today() -> int:
    return day_of(datetime.now(UTC))


def milliseconds_of(moment: datetime) -> int:
    """Since 1970, as the tables hold times."""
    return round(moment.timestamp() * 1000)
