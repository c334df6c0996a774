"""The limits of a workspace: requests in a sliding minute, tokens in a day of UTC.

Requests are counted at the door (`Ticket.take`), by a `Window`. Tokens are reserved in the store by the transaction
that writes a request's usage row anyway (`reserve`), and come down to what was really used when it is settled.
Workspaces without limits pay nothing here. Knows no HTTP but the headers and the refusals.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.proto.config_limits import PlanConfig
from aiexport_edge.shim.errors import RateLimited, store_unavailable
from aiexport_edge.shim.limits.window import Taken, Window
from aiexport_edge.shim.store import Principal
from aiexport_edge.shim.store.days import today
from aiexport_edge.shim.store.errors import remedy
from aiexport_edge.shim.store.quotas import Claim, Standing, read_standing
from aiexport_edge.shim.usage import Entry, QuotaSpent, UsageLedger

FRESH_S = 1.0  # how old a workspace's standing may be where nothing depends on it but a header
IN_FLIGHT_RETRY_S = 2.0  # when something of the quota may be free again that requests in flight hold
_NO_RETRY = ((b"x-should-retry", b"false"),)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Quota:
    """How a workspace stands today. `limit` None: without limit."""

    limit: int | None
    standing: Standing

    @property
    def left(self) -> int | None:
        """Tokens that are neither used nor reserved; None without limit."""
        return None if self.limit is None else max(0, self.limit - self.standing.used - self.standing.reserved)

    @property
    def spent(self) -> bool:
        """Nothing more today, whatever becomes of what is in flight."""
        return self.limit is not None and self.standing.used >= self.limit

    @property
    def retry_after_s(self) -> float:
        """Where nothing is left: until something may be."""
        return seconds_to_midnight() if self.spent else IN_FLIGHT_RETRY_S


class OverQuota(Exception):
    """The tokens of the day are used, or reserved by what is in flight."""

    def __init__(self, quota: Quota) -> None:
        super().__init__("the tokens of the day are used, or reserved by what is in flight")
        self.quota = quota


class Reservation:
    """Tokens held for work whose usage row is written elsewhere, by `usage_rows.record`, which lets go of them too."""

    def __init__(self, ledger: UsageLedger, claim: Claim | None) -> None:
        self._ledger = ledger
        self._claim = claim

    def release(self) -> None:
        """Lets go: the work has failed and uses nothing, or its row is written. Returns at once; may be repeated."""
        if self._claim is not None:
            self._ledger.release(self._claim.id)


class Limits:
    """One process's view. Exact over all processes that share the window and the store."""

    def __init__(
        self,
        plans: Mapping[str, PlanConfig],
        window: Window,
        ledger: UsageLedger,
        database: Engine,
        threads: Executor,
    ) -> None:
        self._plans = plans
        self._window = window
        self._ledger = ledger
        self._database = database
        self._threads = threads
        self._standings: dict[str, tuple[float, Standing]] = {}  # when read, by the monotonic clock

    def requests_per_minute(self, principal: Principal) -> int | None:
        """None: without limit."""
        return _limit(principal.requests_per_minute, self._plans[principal.plan].requests_per_minute)

    def tokens_per_day(self, principal: Principal) -> int | None:
        """None: without limit."""
        return _limit(principal.tokens_per_day, self._plans[principal.plan].tokens_per_day)

    def ticket(self, principal: Principal) -> Ticket | None:
        """For one call; None where the workspace has no limits."""
        requests, tokens = self.requests_per_minute(principal), self.tokens_per_day(principal)
        if requests is None and tokens is None:
            return None
        return Ticket(self, self._window, principal.workspace_id, requests, tokens)

    async def close(self) -> None:
        await self._window.close()

    # ------------------------------------------------------------------------------------------ tokens

    async def reserve(self, entry: Entry, principal: Principal, tokens: int) -> None:
        """Writes the entry's row and reserves `tokens`, what the request may use at most, in one transaction.

        Raises `RateLimited`, or what the database raised.
        """
        entry.claim = self._claim(principal, tokens, entry.request_id)
        try:
            standing = await self._ledger.reserve(entry)
        except QuotaSpent as spent:
            raise refusal(self._refused(principal, spent.standing)) from None
        if standing is not None:
            self._note(principal.workspace_id, standing)

    async def settled(self, entry: Entry, status: str) -> None:
        """Returns when the entry is settled in the database, or when that has failed: it is then tried again."""
        standing = await self._ledger.settled(entry, status)
        if standing is not None:
            self._note(entry.workspace_id, standing)

    async def reserve_tokens(self, principal: Principal, tokens: int, request_id: str) -> Reservation:
        """Reserves `tokens` for work whose usage row is written when it has ended (`usage_rows.record`).

        Raises `OverQuota`, or what the database raised.
        """
        claim = self._claim(principal, tokens, request_id)
        if claim is not None:
            try:
                self._note(principal.workspace_id, await self._ledger.hold(claim))
            except QuotaSpent as spent:
                raise OverQuota(self._refused(principal, spent.standing)) from None
        return Reservation(self._ledger, claim)

    async def quota(self, principal: Principal, *, fresh_s: float = 0.0) -> Quota:
        """How the caller's workspace stands, as of at most `fresh_s` ago."""
        limit = self.tokens_per_day(principal)
        if limit is None:
            return Quota(None, Standing(today()))
        return Quota(limit, await self.standing(principal.workspace_id, fresh_s))

    async def standing(self, workspace_id: str, fresh_s: float) -> Standing:
        """As of at most `fresh_s` ago."""
        known = self._standings.get(workspace_id)
        if known is not None and known[0] + fresh_s > time.monotonic() and known[1].day == today():
            return known[1]
        loop = asyncio.get_running_loop()
        standing = await loop.run_in_executor(self._threads, read_standing, self._database, workspace_id, today())
        self._note(workspace_id, standing)
        return standing

    def last_standing(self, workspace_id: str) -> Standing | None:
        """What was last heard."""
        known = self._standings.get(workspace_id)
        return None if known is None else known[1]

    def _claim(self, principal: Principal, tokens: int, request_id: str) -> Claim | None:
        limit = self.tokens_per_day(principal)
        return None if limit is None else Claim(request_id, principal.workspace_id, tokens, limit, today())

    def _refused(self, principal: Principal, standing: Standing) -> Quota:
        self._note(principal.workspace_id, standing)
        return Quota(self.tokens_per_day(principal), standing)

    def _note(self, workspace_id: str, standing: Standing) -> None:
        self._standings[workspace_id] = (time.monotonic(), standing)


class Ticket:
    """One call against the limits of its workspace, from the door to the reply's headers."""

    def __init__(
        self, limits: Limits, window: Window, workspace_id: str, requests: int | None, tokens: int | None
    ) -> None:
        self._limits = limits
        self._window = window
        self._workspace_id = workspace_id
        self._requests = requests
        self._tokens = tokens
        self._taken: Taken | None = None

    async def take(self) -> None:
        """Counts the call. Raises `RateLimited` where the minute is full, `Overloaded` where it can't be counted."""
        if self._tokens is not None:
            await self._limits.standing(self._workspace_id, FRESH_S)
        if self._requests is None:
            return
        try:
            self._taken = await self._window.take(self._workspace_id, self._requests)
        except OSError as error:
            log.error("requests a minute can't be counted: %s; make room in /dev/shm", error.strerror)
            raise store_unavailable() from None
        if self._taken.mark is None:
            raise RateLimited(
                f"The workspace may send {self._requests} requests a minute; send this one again later.",
                retry_after=self._taken.retry_after_s,
            )

    def require_tokens(self) -> None:
        """Refuses early where the day's tokens are used up (`RateLimited`); whether they last, `reserve` says."""
        standing = self._limits.last_standing(self._workspace_id)
        if self._tokens is not None and standing is not None and standing.day == today():
            quota = Quota(self._tokens, standing)
            if quota.spent:
                raise refusal(quota)

    async def give_back(self) -> None:
        """The call was refused after all and does not count. Never raises: a reply is under way."""
        if self._taken is None or self._taken.mark is None:
            return
        mark, self._taken = self._taken.mark, Taken(None, self._taken.remaining + 1, self._taken.reset_s)
        try:
            await self._window.give_back(self._workspace_id, mark)
        except SQLAlchemyError as error:
            log.error("a refused call stays counted for a minute: %s", remedy(error))
        except OSError as error:
            log.error("a refused call stays counted for a minute: %s; make room in /dev/shm", error.strerror)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """`X-RateLimit-…` as of now."""
        headers = []
        if self._requests is not None and self._taken is not None:
            remaining, reset_s = self._taken.remaining, self._taken.reset_s
            headers += _headers(b"requests", self._requests, max(0, remaining), reset_s)
        if self._tokens is not None:
            standing = self._limits.last_standing(self._workspace_id) or Standing(today())
            left = Quota(self._tokens, standing).left if standing.day == today() else self._tokens
            assert left is not None
            headers += _headers(b"tokens", self._tokens, left, seconds_to_midnight())
        return headers


def refusal(quota: Quota) -> RateLimited:
    """What a client is told of a quota with nothing left."""
    if quota.spent:
        message = f"The workspace has used its {quota.limit} tokens of this day; the next begins at 00:00 UTC."
        return RateLimited(message, retry_after=quota.retry_after_s, headers=_NO_RETRY)
    message = (
        f"What is in flight may use the rest of the workspace's {quota.limit} tokens of this day; "
        "send the request again when some of it has ended."
    )
    return RateLimited(message, retry_after=quota.retry_after_s)


def seconds_to_midnight() -> float:
    """To the next 00:00 UTC, by the wall clock."""
    return 86_400 - time.time() % 86_400


def _limit(own: int | None, plans: int | None) -> int | None:
    return plans if own is None else own or None


def _headers(kind: bytes, limit: int, remaining: int, reset_s: float) -> list[tuple[bytes, bytes]]:
    return [
        (b"x-ratelimit-limit-" + kind, b"%d" % limit),
        (b"x-ratelimit-remaining-" + kind, b"%d" % remaining),
        (b"x-ratelimit-reset-" + kind, b"%d" % math.ceil(reset_s)),
    ]
