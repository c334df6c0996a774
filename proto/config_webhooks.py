"""`[webhooks]`: which addresses may be called when a batch ends, and how long a call may take.

An entry of `allow` is a host name (with whatever address it has), an address, a block of addresses in CIDR notation, or
`public`: every address of the open internet. Without entries nothing is called.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.units import parse_duration

PUBLIC = "public"
_HOST = re.compile(
    r"(?=.{1,253}$)(?!\d+$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*"
)


@dataclass(frozen=True, slots=True)
class WebhooksConfig:
    """`ca`: PEM file of authorities to trust besides the system's; `timeout`: for one call, all of it."""

    allow: tuple[str, ...]
    timeout: timedelta
    ca: Path | None


def read_webhooks(table: Table, base: Path) -> WebhooksConfig:
    nothing: tuple[str, ...] = ()
    webhooks = WebhooksConfig(
        allow=table.take("allow", address_rules, nothing),
        timeout=table.take("timeout", parse_duration, timedelta(seconds=15)),
        ca=table.take("ca", values.path(base), None),
    )
    table.end()
    if webhooks.timeout > timedelta(minutes=2):
        raise table.error("timeout", "must be at most 2m")
    return webhooks


def address_rules(value: object) -> tuple[str, ...]:
    """A list of host names, addresses, CIDR blocks and `public`, each in its one spelling."""
    if not isinstance(value, list):
        raise ValueError('must be a list such as ["hooks.example.com", "10.0.0.0/8", "public"]')
    return tuple(dict.fromkeys(_rule(item) for item in value))


def _rule(item: object) -> str:
    if not isinstance(item, str):
        raise ValueError(f"holds {item!r}, which is no text")
    text = item.strip().lower().removesuffix(".")
    if text == PUBLIC:
        return text
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as problem:
        if "/" in text or ":" in text or re.fullmatch(r"[0-9.]+", text):
            raise ValueError(f"holds {item!r}, which is no address block: {problem}") from None
    if not _HOST.fullmatch(text):
        raise ValueError(f'holds {item!r}, which is no host name, address, CIDR block or "public"')
    return text
