"""The stretches of time in which shim processes could serve, in the database, and what they add up to. Synchronous.

A process lengthens its stretch with every beat while it can serve; what no stretch covers was downtime. Rows older than
the window go, but the first of all stays: it says since when this installation is there.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Engine, and_, delete, func, insert, select, update

from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.schema import uptime, usage
from aiexport_edge.shim.store.store import now_ms

WINDOW_MS = timedelta(days=30) // timedelta(milliseconds=1)
FIRST_TOKEN_WINDOW_MS = timedelta(days=1) // timedelta(milliseconds=1)
MAX_SAMPLES = 1000
MAX_GAP_MS = 60_000  # between two beats of one stretch: a machine that slept, or a clock that was set, begins another


@dataclass(frozen=True, slots=True)
class History:
    """`since_ms`: where the window begins, 30 days ago or at the installation's first beat. None: nothing recorded."""

    since_ms: int | None
    is_whole: bool  # the window is 30 days long
    availability: float | None  # share of it, 0 to 1
    first_token_p50_ms: int | None  # of the newest interactive replies of the last day


class UptimeRows:
    """One process's stretch. Not thread-safe: one caller at a time."""

    def __init__(self, database: Engine) -> None:
        self._database = database
        self._stretch: str | None = None
        self._last = 0

    def beat(self, *, serving: bool) -> None:
        """Says that this process can serve now, or can't."""
        if not serving:
            self._stretch = None
            return
        now = now_ms()
        with write(self._database, synchronous="NORMAL") as connection:
            if self._stretch is not None and 0 <= now - self._last <= MAX_GAP_MS:
                mine = update(uptime).where(uptime.c.id == self._stretch).values(ended_at=now)
                if connection.execute(mine).rowcount:
                    self._last = now
                    return
            self._stretch, self._last = new_id("up_"), now
            connection.execute(insert(uptime).values(id=self._stretch, started_at=now, ended_at=now))

    def history(self) -> History:
        """What is recorded."""
        now = now_ms()
        stretches = select(uptime.c.started_at, uptime.c.ended_at).where(uptime.c.ended_at > now - WINDOW_MS)
        newest = (
            select(usage.c.first_token_at - usage.c.created_at)
            .where(
                usage.c.created_at > now - FIRST_TOKEN_WINDOW_MS,
                usage.c.first_token_at.is_not(None),
                usage.c.batch.is_(False),
            )
            .order_by(usage.c.created_at.desc())
            .limit(MAX_SAMPLES)
        )
        with read(self._database) as connection:
            installed = connection.execute(select(func.min(uptime.c.started_at))).scalar_one_or_none()
            rows = [(int(start), int(end)) for start, end in connection.execute(stretches)]
            delays = [int(delay) for delay in connection.execute(newest).scalars()]
        p50 = round(statistics.median(delays)) if delays else None
        if installed is None:
            return History(None, False, None, p50)
        since = max(int(installed), now - WINDOW_MS)
        return History(since, installed <= now - WINDOW_MS, share_covered(rows, since, now), p50)

    def prune(self) -> None:
        """Deletes what is older than the window, but for the first of all."""
        with write(self._database, synchronous="NORMAL") as connection:
            first = connection.execute(select(func.min(uptime.c.started_at))).scalar_one_or_none()
            if first is not None:
                old = and_(uptime.c.ended_at < now_ms() - WINDOW_MS, uptime.c.started_at > first)
                connection.execute(delete(uptime).where(old))


def share_covered(stretches: Iterable[tuple[int, int]], since: int, until: int) -> float:
    """How much of [since, until] the union of the stretches covers, 0 to 1; 1 where that has no length."""
    if until <= since:
        return 1.0
    covered, end = 0, since
    for start, stop in sorted(stretches):
        start, stop = max(start, end), min(stop, until)
        if stop > start:
            covered += stop - start
            end = stop
    return covered / (until - since)
