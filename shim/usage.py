"""What each request has used: reserved before its 200, checkpointed while it runs, settled at its end.

`settle` never waits, so that it can be called where nothing may be awaited (a client has left, the process drains). One
thread writes: what has come together since its last transaction goes into the next, so that 64 requests at once cost
two or three commits, not 64. It also keeps this process's heartbeat and settles what dead processes left behind.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.shim.store.usage_rows import UsageRows
from aiexport_edge.shim.store.values import UsageRow

CHECKPOINT_S = 1.0
SILENCE = timedelta(seconds=15)  # after which a process counts as dead
_SWEEP_S = 5.0
_MAX_BATCH = 1000

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Entry:
    """One request's usage. The request's handler fills it in as it goes; the writer thread reads it."""

    request_id: str
    message_id: str
    workspace_id: str
    key_id: str
    model: str
    prompt_tokens: int
    cached_tokens: int = 0
    output_tokens: int = 0
    status: str = "running"
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    first_token_at: datetime | None = None
    ended_at: datetime | None = None

    def row(self) -> UsageRow:
        return UsageRow(
            request_id=self.request_id,
            message_id=self.message_id,
            workspace_id=self.workspace_id,
            key_id=self.key_id,
            model=self.model,
            status=self.status,
            input_tokens=self.prompt_tokens - self.cached_tokens,
            cache_read_input_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            created_at=self.created_at,
            first_token_at=self.first_token_at,
            ended_at=self.ended_at,
        )


@dataclass(frozen=True, slots=True)
class _Reserve:
    entry: Entry
    done: asyncio.Future[None]


@dataclass(frozen=True, slots=True)
class _Settle:
    entry: Entry


class UsageLedger:
    """Owns the writer thread. `start` and `close` once each; the other methods from the event loop."""

    def __init__(self, rows: UsageRows) -> None:
        self._rows = rows
        self._inbox: queue.SimpleQueue[_Reserve | _Settle | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="usage", daemon=True)
        # The writer thread's own:
        self._running: dict[str, tuple[Entry, UsageRow]] = {}  # with what was last written
        self._unsaved: dict[str, UsageRow] = {}  # settled, not yet written because the store failed

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Writes what is left; waits for it."""
        self._inbox.put(None)
        self._thread.join()

    async def reserve(self, entry: Entry) -> None:
        """Returns once the entry's row is committed; raises what the database raised."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put(_Reserve(entry, done))
        await done

    def settle(self, entry: Entry, status: str) -> None:
        """The request's end: completed, aborted or failed. Returns at once."""
        entry.status = status
        entry.ended_at = datetime.now(UTC)
        self._inbox.put(_Settle(entry))

    # ------------------------------------------------------------------------------------------ the writer thread

    def _write(self) -> None:
        next_checkpoint = next_sweep = time.monotonic()
        closing = False
        while not closing:
            batch, closing = self._collect(next_checkpoint)
            now = time.monotonic()
            due = now >= next_checkpoint
            if batch or due or closing:
                self._save(batch, checkpoint=due or closing)
            if due:
                next_checkpoint = now + CHECKPOINT_S
            if now >= next_sweep:
                self._sweep()
                next_sweep = now + _SWEEP_S
        try:
            self._rows.leave()
        except SQLAlchemyError as error:
            log.error("the store could not be told that this process ends: %s", _reason(error))

    def _collect(self, until: float) -> tuple[list[_Reserve | _Settle], bool]:
        """What has come in: waits for the first until the next checkpoint, takes the others that are there."""
        batch: list[_Reserve | _Settle] = []
        timeout = max(0.0, until - time.monotonic())
        try:
            item = self._inbox.get(timeout=timeout)
            while item is not None:
                batch.append(item)
                if len(batch) == _MAX_BATCH:
                    return batch, False
                item = self._inbox.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def _save(self, batch: list[_Reserve | _Settle], *, checkpoint: bool) -> None:
        reserves = [item for item in batch if isinstance(item, _Reserve)]
        reserved = [item.entry.row() for item in reserves]
        changed = dict(self._unsaved)
        for reserve, row in zip(reserves, reserved, strict=True):
            self._running[row.request_id] = (reserve.entry, row)
        for item in batch:
            if isinstance(item, _Settle):
                self._running.pop(item.entry.request_id, None)
                changed[item.entry.request_id] = item.entry.row()
        if checkpoint:
            for request_id, (entry, written) in list(self._running.items()):
                row = entry.row()
                if row != written:
                    self._running[request_id] = (entry, row)
                    changed[request_id] = row
        try:
            self._rows.save(reserved, list(changed.values()))
        except SQLAlchemyError as error:
            log.error("usage could not be written and will be tried again: %s", _reason(error))
            self._unsaved = {request_id: row for request_id, row in changed.items() if row.ended_at is not None}
            for row in reserved:
                self._running.pop(row.request_id, None)
            _resolve(reserves, error)
        else:
            self._unsaved = {}
            _resolve(reserves, None)

    def _sweep(self) -> None:
        try:
            settled = self._rows.settle_dead(SILENCE)
        except SQLAlchemyError as error:
            log.error("usage of ended processes could not be settled: %s", _reason(error))
        else:
            if settled:
                log.warning("settled %d requests of a process that died", settled)


def _resolve(reserves: Iterable[_Reserve], error: Exception | None) -> None:
    """Tells the waiting handlers, in one call a loop."""

    def tell(dones: list[asyncio.Future[None]]) -> None:
        for done in dones:
            if not done.done():
                if error is None:
                    done.set_result(None)
                else:
                    done.set_exception(error)

    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for reserve in reserves:
        by_loop.setdefault(reserve.done.get_loop(), []).append(reserve.done)
    for loop, dones in by_loop.items():
        try:
            loop.call_soon_threadsafe(tell, dones)
        except RuntimeError:  # the loop is closed: nobody waits any more
            continue


def _reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error)
