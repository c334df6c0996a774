"""What the modules of the store share: times as rows have them, and the number that every change raises."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, update

from aiexport_edge.shim.store.schema import generation


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def milliseconds(value: timedelta) -> int:
    return value // timedelta(milliseconds=1)


def time_of(value: int) -> datetime:
    """A row's milliseconds as a time in UTC."""
    return datetime.fromtimestamp(value / 1000, UTC)


def time_or_none(value: int | None) -> datetime | None:
    return None if value is None else time_of(value)


def bump(connection: Connection) -> None:
    """Raises the generation, which running processes poll: they drop what they have cached.

    Of two transactions that do this, the second waits for the first.
    """
    connection.execute(update(generation).values(value=generation.c.value + 1))
