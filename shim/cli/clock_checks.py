"""`doctor` about the clock: tokens, keys that expire, the days of quotas and the retention of results go by it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine, func, select, text

from aiexport_edge.shim.cli.check import OK, PROBLEM, WARNING, Check
from aiexport_edge.shim.store.database import read
from aiexport_edge.shim.store.schema import uptime

BEGINNING = datetime(2025, 4, 1, tzinfo=UTC)  # of the API that is served: no right clock stands before it
NEAR = timedelta(seconds=30)
REMEDY = "set it (timedatectl set-time, or an NTP server of your network), then restart the server"


def clock(database: Engine) -> Iterator[Check]:
    """Whether it is in the past, by what the store has recorded and by the database server's own."""
    now = datetime.now(UTC)
    detail = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    if now < BEGINNING:
        yield Check("clock", PROBLEM, f"{detail}: it was never set", REMEDY)
        return
    with read(database) as connection:
        newest = connection.execute(select(func.max(uptime.c.ended_at))).scalar_one_or_none()
        theirs = now
        if database.dialect.name == "postgresql":
            theirs = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    ahead = timedelta(0) if newest is None else datetime.fromtimestamp(newest / 1000, UTC) - now
    if ahead > NEAR:
        yield Check("clock", PROBLEM, f"{detail}: the store has records of {_long(ahead)} later", REMEDY)
    elif abs(theirs - now) > NEAR:
        detail += f": {_long(abs(theirs - now))} from the database server's"
        yield Check("clock", WARNING, detail, "set both by the same NTP server")
    else:
        yield Check("clock", OK, detail)


def _long(span: timedelta) -> str:
    return str(timedelta(seconds=int(span.total_seconds())))
