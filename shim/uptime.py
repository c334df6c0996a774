"""Records when this installation can serve, and keeps what `/status` shows of it at hand.

One beat every few seconds, one look at the history now and then: asking for the page asks the store nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.shim.store.uptime_rows import History, UptimeRows

BEAT_S = 5.0
LOOK_S = 30.0
PRUNE_S = 3600.0

log = logging.getLogger(__name__)


class Uptime:
    """`run` for as long as this process serves; `serving` tells whether it can, just now."""

    def __init__(self, rows: UptimeRows, threads: Executor, serving: Callable[[], bool]) -> None:
        self._rows = rows
        self._threads = threads
        self._serving = serving
        self.history: History | None = None  # until the store has answered for the first time

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        next_look = next_prune = time.monotonic()
        while True:
            now = time.monotonic()
            nothing_yet = self.history is None or self.history.since_ms is None
            look, prune = nothing_yet or now >= next_look, now >= next_prune
            next_look = now + LOOK_S if look else next_look
            next_prune = now + PRUNE_S if prune else next_prune
            try:
                await loop.run_in_executor(self._threads, self._turn, self._serving(), look, prune)
            except SQLAlchemyError as error:
                log.error("the store does not take this moment's uptime: %s", getattr(error, "orig", None) or error)
            await asyncio.sleep(BEAT_S)

    def _turn(self, serving: bool, look: bool, prune: bool) -> None:
        self._rows.beat(serving=serving)
        if prune:
            self._rows.prune()
        if look:
            self.history = self._rows.history()
