"""The calls of a minute in Redis: exact over every machine that asks it, one script a call, by Redis's own clock.

While Redis does not answer, each machine counts by itself what its own processes let in: the limit then holds for each
machine, not for all together, and an operator is told once when it begins and once when it is over. That is better than
refusing everybody because a counter is away, and than letting everybody in. So that the fallback starts with the truth
of this machine, every call that Redis lets in is noted there too. Redis is asked again after `RETRY_S`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from aiexport_edge.shim import metrics
from aiexport_edge.shim.limits.shared_window import SharedWindow
from aiexport_edge.shim.limits.window import WINDOW_S, Taken
from aiexport_edge.shim.store.keys import new_id

RETRY_S = 5.0

# KEYS: the workspace's calls, a sorted set by time. ARGV: limit, window in microseconds, the call's mark. Calls that
# lie ahead go too: the server's clock has been set back, and would count them for as long.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local window = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - window)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. string.format('%.0f', now), '+inf')
local used = redis.call('ZCARD', KEYS[1])
local limit = tonumber(ARGV[1])
if used >= limit then
  local nth = redis.call('ZRANGE', KEYS[1], used - limit, used - limit, 'WITHSCORES')[2]
  local newest = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
  return {0, 0, newest + window - now, nth + window - now}
end
redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[3])
redis.call('PEXPIRE', KEYS[1], math.ceil(window / 1000) + 1000)
return {1, limit - used - 1, window, 0}
"""

log = logging.getLogger(__name__)


def why_silent(url: str, password_file: Path | None) -> str | None:
    """Why the Redis at `url` does not answer; None where it does."""
    from redis import Redis
    from redis.exceptions import RedisError

    try:
        with Redis.from_url(
            url, password=_password(password_file), socket_timeout=2, socket_connect_timeout=2
        ) as redis:
            redis.ping()
    except (RedisError, OSError) as error:
        return str(error)
    return None


class RedisWindow:
    """Counts in the Redis at `url`, in `local` while that is away."""

    def __init__(self, url: str, password_file: Path | None, local: SharedWindow, *, timeout_s: float = 1.0) -> None:
        """A call waits for Redis no longer than `timeout_s`.

        Raises `ModuleNotFoundError` without the client, `OSError` where the password can't be read."""
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        self._redis = Redis.from_url(
            url,
            password=_password(password_file),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),  # a connection that Redis has closed meanwhile is opened again at once
            client_name="aiexport-edge",
        )
        self._errors: tuple[type[Exception], ...] = (RedisError, OSError, TimeoutError)
        self._script: Any = self._redis.register_script(_TAKE)
        self._local = local
        self._timeout_s = timeout_s
        self._away_until: float | None = None  # by the monotonic clock; None: it answers

    async def take(self, workspace_id: str, limit: int) -> Taken:
        if self._away_until is None or time.monotonic() >= self._away_until:
            mark = new_id("call_")
            arguments = (limit, int(WINDOW_S * 1e6), mark)
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._script(keys=[_key(workspace_id)], args=arguments)
            except self._errors as error:
                self._lost(error)
            else:
                self._found()
                let_in, remaining, reset_us, retry_us = (int(number) for number in answer)
                if not let_in:
                    return Taken(None, 0, reset_us / 1e6, retry_us / 1e6)
                noted = await self._local.note(workspace_id, limit)
                return Taken(f"{mark} {noted}", remaining, reset_us / 1e6)
        return await self._local.take(workspace_id, limit)

    async def give_back(self, workspace_id: str, mark: str | int) -> None:
        if isinstance(mark, int):
            await self._local.give_back(workspace_id, mark)
            return
        member, _, noted = mark.partition(" ")
        await self._local.give_back(workspace_id, int(noted))
        if self._away_until is not None:
            return  # what it still counts lapses within the minute
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._redis.zrem(_key(workspace_id), member)
        except self._errors as error:
            self._lost(error)

    async def close(self) -> None:
        await self._redis.aclose()
        await self._local.close()

    def _lost(self, error: Exception) -> None:
        if self._away_until is None:
            metrics.LIMITS_LOCAL.set(1)
            log.error(
                "Redis does not answer (%s): until it does, requests a minute are counted for each machine by itself; "
                "check [limits] redis_url and the server",
                type(error).__name__,
            )
        self._away_until = time.monotonic() + RETRY_S

    def _found(self) -> None:
        if self._away_until is not None:
            metrics.LIMITS_LOCAL.set(0)
            log.warning("Redis answers again: requests a minute are counted for all machines together")
            self._away_until = None


def _password(file: Path | None) -> str | None:
    return None if file is None else file.read_text(encoding="utf-8").strip()


def _key(workspace_id: str) -> str:
    return f"aiexport-edge:calls:{workspace_id}"
