"""What each request has used: reserved before its 200, checkpointed while it runs, settled at its end.

Where the tokens of a workspace are limited, the same transaction that writes a request's row reserves what it may use.

`settle` never waits, so that it can be called where nothing may be awaited (a client has left, the process drains). One
thread writes: what has come together since its last transaction goes into the next, so that 64 requests at once cost
two or three commits, not 64. It also keeps this process's heartbeat, settles what dead processes left behind and
deletes single rows past their retention.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.shim.prices import Price
from aiexport_edge.shim.store.errors import remedy
from aiexport_edge.shim.store.quotas import Claim, Decision, Standing
from aiexport_edge.shim.store.usage_rows import UsageRows
from aiexport_edge.shim.store.values import UsageRow

CHECKPOINT_S = 1.0
SILENCE = timedelta(seconds=15)  # after which a process counts as dead
_SWEEP_S = 5.0
_FORGET_S = 60.0
_FORGET_ROWS = 100  # at a time: from a cold disk that takes a tenth of a second, for which requests wait
_MAX_BATCH = 1000

log = logging.getLogger(__name__)


class QuotaSpent(Exception):
    """The claim was refused: the day's tokens are used, or reserved by what is in flight."""

    def __init__(self, standing: Standing) -> None:
        super().__init__("the tokens of the day are used or reserved")
        self.standing = standing


@dataclass(slots=True, eq=False)
class Entry:
    """One request's usage. The request's handler fills it in as it goes; the writer thread reads it.

    `model` is the id that was asked for, and that the reply names; `claim` is set where the workspace's tokens are
    limited (`Limits.reserve` does).
    """

    request_id: str
    message_id: str
    workspace_id: str
    key_id: str
    model: str
    prompt_tokens: int
    price: Price
    batch: bool = False
    claim: Claim | None = None
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
            batch=self.batch,
            cost=self.prompt_tokens * self.price.input + self.output_tokens * self.price.output,
        )


@dataclass(frozen=True, slots=True)
class _Reserve:
    entry: Entry | None  # None: a claim without a row
    claim: Claim | None
    done: asyncio.Future[Standing | None]

    @property
    def id(self) -> str:
        if self.entry is not None:
            return self.entry.request_id
        assert self.claim is not None
        return self.claim.id


@dataclass(frozen=True, slots=True)
class _Settle:
    entry: Entry


@dataclass(frozen=True, slots=True)
class _Release:
    claim_id: str


@dataclass(frozen=True, slots=True)
class _Flush:
    claim: Claim | None  # whose workspace's standing is asked for
    done: asyncio.Future[Standing | None]


_Item = _Reserve | _Settle | _Release | _Flush


class UsageLedger:
    """Owns the writer thread. `start` and `close` once each; the other methods from the event loop."""

    def __init__(self, rows: UsageRows, retention: timedelta) -> None:
        self._rows = rows
        self._retention = retention
        self._inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="usage", daemon=True)
        # The writer thread's own:
        self._running: dict[str, tuple[Entry, UsageRow]] = {}  # with what was last written
        self._unsaved: dict[str, UsageRow] = {}  # settled, not yet written because the store failed
        self._unreleased: set[str] = set()  # claims, likewise
        self._refused: set[str] = set()  # of entries that have no row, and are yet to be settled

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Writes what is left; waits for it."""
        self._inbox.put(None)
        self._thread.join()

    async def reserve(self, entry: Entry) -> Standing | None:
        """Returns once the entry's row is committed, with how its workspace then stands where it has a claim.

        Raises `QuotaSpent` where the claim is refused, or what the database raised.
        """
        return await self._ask(lambda done: _Reserve(entry, entry.claim, done))

    async def hold(self, claim: Claim) -> Standing:
        """Reserves tokens without a row; raises as `reserve` does. `release` them, or let `record` do so."""
        standing = await self._ask(lambda done: _Reserve(None, claim, done))
        assert standing is not None
        return standing

    def release(self, claim_id: str) -> None:
        """Lets go of what `hold` reserved. Returns at once."""
        self._inbox.put(_Release(claim_id))

    async def flush(self) -> None:
        """Returns once everything settled before is in the database; raises what the database raised."""
        await self._ask(lambda done: _Flush(None, done))

    async def _ask(self, item: Callable[[asyncio.Future[Standing | None]], _Item]) -> Standing | None:
        done: asyncio.Future[Standing | None] = asyncio.get_running_loop().create_future()
        self._inbox.put(item(done))
        return await done

    def settle(self, entry: Entry, status: str) -> None:
        """The request's end: completed, aborted or failed. Returns at once."""
        entry.status = status
        entry.ended_at = datetime.now(UTC)
        self._inbox.put(_Settle(entry))

    async def settled(self, entry: Entry, status: str) -> Standing | None:
        """`settle`, and returns when it is in the database, or when that has failed: it is then tried again.

        With how its workspace then stands, where it had a claim.
        """
        self.settle(entry, status)
        try:
            return await self._ask(lambda done: _Flush(entry.claim, done))
        except SQLAlchemyError:
            return None

    # ------------------------------------------------------------------------------------------ the writer thread

    def _write(self) -> None:
        next_checkpoint = next_sweep = next_forgetting = time.monotonic()
        closing = False
        while not closing:
            batch, closing = self._collect(next_checkpoint)
            now = time.monotonic()
            due = now >= next_checkpoint
            saved = self._save(batch, checkpoint=due or closing) if batch or due or closing else True
            if due:
                next_checkpoint = now + CHECKPOINT_S
            if not saved:  # what follows would wait for the same lock, and whoever asks next for all of it
                self._rows.doubt()
                continue
            if now >= next_sweep:
                self._sweep()
                next_sweep = now + _SWEEP_S
            if now >= next_forgetting:
                next_forgetting = now + (CHECKPOINT_S if self._forget() else _FORGET_S)
        try:
            self._rows.leave()
        except SQLAlchemyError as error:
            log.error("the store could not be told that this process ends: %s", remedy(error))

    def _collect(self, until: float) -> tuple[list[_Item], bool]:
        """What has come in: waits for the first until the next checkpoint, takes the others that are there."""
        batch: list[_Item] = []
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

    def _save(self, batch: list[_Item], *, checkpoint: bool) -> bool:
        """One transaction; whether the store took it. What it did not take is kept for the next."""
        asked = [item for item in batch if isinstance(item, _Reserve | _Flush)]
        reserves = [item for item in batch if isinstance(item, _Reserve)]
        flushes = [item for item in batch if isinstance(item, _Flush)]
        entries = [item.entry for item in reserves if item.entry is not None]
        # a client that left at once may have settled its entry already
        reserved = [replace(entry.row(), status="running", ended_at=None) for entry in entries]
        claims = [item.claim for item in reserves if item.claim is not None]
        changed, released = dict(self._unsaved), set(self._unreleased)
        for entry, row in zip(entries, reserved, strict=True):
            self._running[row.request_id] = (entry, row)
        for item in batch:
            if isinstance(item, _Settle) and item.entry.request_id in self._refused:
                self._refused.discard(item.entry.request_id)
            elif isinstance(item, _Settle):
                self._running.pop(item.entry.request_id, None)
                changed[item.entry.request_id] = item.entry.row()
                if item.entry.claim is not None:
                    released.add(item.entry.claim.id)
            elif isinstance(item, _Release):
                released.add(item.claim_id)
        if checkpoint:
            for request_id, (entry, written) in list(self._running.items()):
                row = entry.row()
                if row != written:
                    self._running[request_id] = (entry, row)
                    changed[request_id] = row
        try:
            looks = {(item.claim.workspace_id, item.claim.day) for item in flushes if item.claim is not None}
            saved = self._rows.save(reserved, list(changed.values()), claims, sorted(released), looks)
        except SQLAlchemyError as error:
            log.error("usage could not be written and will be tried again: %s", remedy(error))
            self._unsaved = {request_id: row for request_id, row in changed.items() if row.ended_at is not None}
            self._unreleased = released | {claim.id for claim in claims}  # the commit may have gone through
            for row in reserved:
                self._running.pop(row.request_id, None)
            _resolve(asked, error)
            return False
        else:
            self._unsaved, self._unreleased = {}, set()
            for refused in saved.refused:
                if self._running.pop(refused, None) is not None:
                    self._refused.add(refused)
            _resolve(asked, saved)
            return True

    def _sweep(self) -> None:
        try:
            settled = self._rows.settle_dead(SILENCE)
        except SQLAlchemyError as error:
            log.error("usage of ended processes could not be settled: %s", remedy(error))
        else:
            if settled:
                log.warning("settled %d requests of a process that died", settled)

    def _forget(self) -> bool:
        """Deletes some single rows past their retention; whether there may be more."""
        try:
            return self._rows.forget(self._retention, _FORGET_ROWS) == _FORGET_ROWS
        except SQLAlchemyError as error:
            log.error("old usage could not be deleted: %s", remedy(error))
            return False


def _resolve(asked: Iterable[_Reserve | _Flush], outcome: Decision | Exception) -> None:
    """Tells the waiting handlers, in one call a loop."""

    def tell(items: list[_Reserve | _Flush]) -> None:
        for item in items:
            if item.done.done():
                continue
            if isinstance(outcome, Exception):
                item.done.set_exception(outcome)
            elif item.claim is None:
                item.done.set_result(None)
            elif isinstance(item, _Reserve) and item.id in outcome.refused:
                item.done.set_exception(QuotaSpent(outcome.standings[item.claim.workspace_id]))
            else:
                item.done.set_result(outcome.standings[item.claim.workspace_id])

    by_loop: dict[asyncio.AbstractEventLoop, list[_Reserve | _Flush]] = {}
    for item in asked:
        by_loop.setdefault(item.done.get_loop(), []).append(item)
    for loop, items in by_loop.items():
        try:
            loop.call_soon_threadsafe(tell, items)
        except RuntimeError:  # the loop is closed: nobody waits any more
            continue
