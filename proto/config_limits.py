"""`[limits]`: where the calls of a minute are counted, and `[plans.NAME]`: what a plan allows.

Numbers are per workspace, over all its keys; None is "unlimited". Knows nothing of how they are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.config_values import FAMILIES, PLAN_FAMILIES
from aiexport_edge.proto.units import parse_duration

UNLIMITED = "unlimited"
MAX_REQUESTS_PER_MINUTE = 1_000_000
MAX_TOKENS_PER_DAY = 10**15
MAX_BATCH_SIZE = 10_000


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """`redis_url` is "" where the machine itself (or PostgreSQL, where that is the store) counts the calls.

    `redis_timeout`: how long a call waits for Redis before the machine counts it by itself.
    """

    redis_url: str
    redis_password_file: Path | None
    redis_timeout: timedelta


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """`[plans.NAME]`. `families`: the models that may be used; `weight`: its share of the engine against others'."""

    families: tuple[str, ...]
    weight: float
    requests_per_minute: int | None
    tokens_per_day: int | None
    batch_size: int  # requests in one batch


PLAN_DEFAULTS = {
    "free": PlanConfig(("haiku",), 1.0, 60, 100_000, 100),
    "pro": PlanConfig(FAMILIES, 4.0, 600, 10_000_000, 5_000),
    "enterprise": PlanConfig(PLAN_FAMILIES, 8.0, None, None, MAX_BATCH_SIZE),
}
PLANS = tuple(PLAN_DEFAULTS)


def read_plans(table: Table) -> dict[str, PlanConfig]:
    plans = {}
    for name in PLANS:
        plan, default = table.table(name), PLAN_DEFAULTS[name]
        requests = limit(MAX_REQUESTS_PER_MINUTE)
        plans[name] = PlanConfig(
            families=plan.take("families", values.families, default.families),
            weight=plan.take("weight", values.weight, default.weight),
            requests_per_minute=plan.take("requests_per_minute", requests, default.requests_per_minute),
            tokens_per_day=plan.take("tokens_per_day", limit(MAX_TOKENS_PER_DAY), default.tokens_per_day),
            batch_size=plan.take("batch_size", values.integer(1, MAX_BATCH_SIZE), default.batch_size),
        )
        plan.end()
    table.end()
    return plans


def read_limits(table: Table, base: Path) -> LimitsConfig:
    config = LimitsConfig(
        redis_url=table.take("redis_url", redis_url, ""),
        redis_password_file=table.take("redis_password_file", values.path(base), None),
        redis_timeout=table.take("redis_timeout", parse_duration, timedelta(seconds=1)),
    )
    table.end()
    if config.redis_password_file is not None and not config.redis_url:
        raise table.error("redis_url", "is missing; redis_password_file is for the server that it names")
    return config


def redis_url(value: object) -> str:
    url = values.text(value)
    parts = urlsplit(url)
    if parts.password:  # not repeated
        raise ValueError("must hold no password; write it into a file and name that in redis_password_file")
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f'must be an address such as "redis://127.0.0.1:6379/0", not {value!r}')
    return url


def limit(high: int) -> Callable[[object], int | None]:
    """A number of something per time, or "unlimited"."""
    number = values.integer(1, high)

    def parse(value: object) -> int | None:
        if value == UNLIMITED:
            return None
        try:
            return number(value)
        except ValueError as problem:
            raise ValueError(f'{problem}; or "{UNLIMITED}"') from None

    return parse
