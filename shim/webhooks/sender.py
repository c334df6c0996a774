"""Delivers what is due, from every shim process: tries, waits longer and longer, gives up after 72 hours.

A receiver may see a delivery twice, where a process dies between the reply and its note; the webhook-id is the same.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError

from aiexport_edge.proto.config_webhooks import WebhooksConfig
from aiexport_edge.proto.version import product_version
from aiexport_edge.shim.address_policy import AddressPolicy, Forbidden
from aiexport_edge.shim.outgoing import tls_context
from aiexport_edge.shim.recurring import forever
from aiexport_edge.shim.secrets import SecretError
from aiexport_edge.shim.store.errors import remedy
from aiexport_edge.shim.store.webhook_rows import Due, WebhookRows
from aiexport_edge.shim.webhooks.post import NotDelivered, post
from aiexport_edge.shim.webhooks.signing import signed_headers

T = TypeVar("T")

DELAYS = tuple(  # after each try that failed; the last one again and again
    timedelta(seconds=seconds) for seconds in (5, 30, 120, 600, 1800, 3600, 7200, 14400, 28800)
)
_JITTER = 0.1
_MAX_IN_FLIGHT = 16
_MAX_OF_WORKSPACE = 4  # a receiver that is slow holds up nobody else's
_NOTING = timedelta(seconds=30)  # past the time of a try: the process that made it must have died
_LOOK_S = 0.5
_FORGET_S = 600.0

log = logging.getLogger(__name__)


def next_try(now: datetime, attempt: int, give_up_at: datetime, jitter: float) -> datetime | None:
    """When to try again after the `attempt`th failure (from 1); None: never. `jitter` in [-1, 1]."""
    if now >= give_up_at:
        return None
    delay = DELAYS[min(attempt, len(DELAYS)) - 1] * (1 + _JITTER * jitter)
    return min(now + delay, give_up_at)  # the last try is at the very end


class WebhookSender:
    """`run` for as long as it is used."""

    def __init__(
        self, rows: WebhookRows, policy: AddressPolicy, config: WebhooksConfig, *, retention: timedelta
    ) -> None:
        self._rows = rows
        self._policy = policy
        self._config = config
        self._retention = retention
        self._threads = ThreadPoolExecutor(2, "webhooks")
        self._tls: ssl.SSLContext | None = None
        self._forget_at = 0.0  # when to look for what is past its time
        self._under_way: dict[asyncio.Task[None], str] = {}  # the workspace of each

    async def run(self) -> None:
        """Looks for what is due until cancelled. What is under way then is tried again later, by whoever is there."""
        try:
            await forever(self._look_and_forget, pause_s=_LOOK_S, what="webhooks")
        finally:
            for task in list(self._under_way):
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
            self._threads.shutdown()

    async def _look_and_forget(self) -> None:
        await self._look()
        if time.monotonic() >= self._forget_at:
            await self._in_thread(lambda: self._rows.forget(self._retention))
            self._forget_at = time.monotonic() + _FORGET_S

    async def _look(self) -> None:
        room = min(_MAX_IN_FLIGHT - len(self._under_way), _MAX_OF_WORKSPACE)
        if room <= 0:
            return
        busy = [each for each, count in Counter(self._under_way.values()).items() if count >= _MAX_OF_WORKSPACE]
        hold = self._config.timeout + _NOTING
        for due in await self._in_thread(lambda: self._rows.take_due(room, hold=hold, busy=busy)):
            task = asyncio.create_task(self._deliver(due))
            self._under_way[task] = due.workspace_id
            task.add_done_callback(lambda done: self._under_way.pop(done, None))

    async def _deliver(self, due: Due) -> None:
        status: int | None = None
        try:
            accepted = await self._post(due)
        except NotDelivered as problem:
            status, reason = problem.status, str(problem)
        except Forbidden as problem:
            reason = f"the URL {problem}"
        except SecretError as problem:
            reason = str(problem)
        except Exception:
            log.exception("webhook %s could not be sent", due.id)
            reason = "an internal error; the log has it"
        else:
            await self._note(due, lambda: self._rows.delivered(due, accepted))
            log.info("webhook %s delivered (try %d)", due.id, due.attempt)
            return
        next_at = next_try(datetime.now(UTC), due.attempt, due.give_up_at, random.uniform(-1, 1))
        await self._note(due, lambda: self._rows.failed(due, status, reason, next_at))
        if next_at is None:
            log.error("webhook %s is given up after %d tries: %s", due.id, due.attempt, reason)
        else:
            log.warning("webhook %s failed (try %d): %s", due.id, due.attempt, reason)

    async def _post(self, due: Due) -> int:
        target = self._policy.check(due.url)
        secrets = await self._in_thread(lambda: self._rows.signing_secrets(due.workspace_id))
        if target.scheme == "https" and self._tls is None:
            self._tls = await self._in_thread(lambda: tls_context(self._config.ca))
        headers = [
            ("user-agent", f"aiexport-edge/{product_version()}"),
            *signed_headers(due.id, int(time.time()), due.payload, secrets),
        ]
        seconds = self._config.timeout.total_seconds()
        return await post(target, headers, due.payload, policy=self._policy, tls=self._tls, seconds=seconds)

    async def _note(self, due: Due, note: Callable[[], None]) -> None:
        """What came of it; where the store fails, it is tried again as if this process had died."""
        try:
            await self._in_thread(note)
        except SQLAlchemyError as error:
            log.error("what came of webhook %s could not be written: %s", due.id, remedy(error))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)
