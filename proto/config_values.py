"""What a single value of the configuration file may be: one function a kind, for `config.py` alone.

Each takes what tomllib gives and returns the value a process uses, or raises `ValueError` with a phrase that reads on
after the key ("must be …"). Knows no key and no file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiexport_edge.proto.units import parse_size, split_address

DNS = "dns:///"  # before a name that stands for all addresses it resolves to
DEMO = "demo"  # the source that stands for the model that comes with the product
FAMILIES = ("opus", "sonnet", "haiku")
CUSTOM = "custom"  # the family of fine-tuned models
PLAN_FAMILIES = (*FAMILIES, CUSTOM)
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


def table(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table, [in.brackets]")
    return value


def tables(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError("must be one or more tables, each under [[models]]")
    return value


def text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text that is not empty, not {value!r}")
    return value


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {value!r}")
    return value


def auto_boolean(value: object) -> bool | None:
    if value == "auto":
        return None
    if not isinstance(value, bool):
        raise ValueError(f'must be true, false or "auto", not {value!r}')
    return value


def integer(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}, not {value!r}")
        return value

    return parse


def auto_integer(low: int, high: int) -> Callable[[object], int]:
    """0 stands for "auto"."""

    def parse(value: object) -> int:
        if value == "auto":
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f'must be "auto" or a whole number from {low} to {high}, not {value!r}')
        return value

    return parse


def number(value: object, low: float, high: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"must be {what}, not {value!r}")
    return float(value)


def price(value: object) -> float:
    return number(value, 0.0, 1e6, "a price in US dollars per million tokens, 0 or more")


def share(value: object) -> float:
    return number(value, 0.001, 1.0, "a share from 0.001 to 1")


def floor_share(value: object) -> float:
    return number(value, 0.0, 0.5, "a share from 0 to 0.5")


def weight(value: object) -> float:
    return number(value, 0.001, 1000.0, "a weight from 0.001 to 1000")


def auto_size(value: object) -> int:
    return 0 if value == "auto" else parse_size(value)


def one_of(choices: tuple[str, ...]) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ValueError(f"must be one of {', '.join(choices)}, not {value!r}{hint}")
        return str(value)

    return parse


def families(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a list of families ({', '.join(PLAN_FAMILIES)})")
    parse = one_of(PLAN_FAMILIES)
    return tuple(dict.fromkeys(parse(item) for item in value))


def device(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value, re.ASCII):
        raise ValueError(f'must be "auto", "cpu" or "cuda:0" (or another number), not {value!r}')
    return value


def host(value: object) -> str:
    host = text(value)
    if not re.fullmatch(r"[A-Za-z0-9._:%-]{1,253}", host, re.ASCII):
        raise ValueError(f'must be an address or a host name such as "127.0.0.1", not {value!r}')
    return host


def grpc_address(value: object) -> str:
    address = text(value)
    if not address.startswith("unix:"):
        try:
            split_address(address)
        except ValueError:
            raise ValueError(f'must be "HOST:PORT" or "unix:PATH", not {value!r}') from None
    elif not address.removeprefix("unix:"):
        raise ValueError('names no socket; write "unix:/path/to/socket"')
    return address


def grpc_target(value: object) -> str:
    """An address, or dns:///HOST:PORT (gRPC's syntax of names, without an authority): all that the name resolves to."""
    target = text(value)
    if not target.startswith("dns:"):
        return grpc_address(target)
    try:
        if not target.startswith(DNS):
            raise ValueError
        split_address(target.removeprefix(DNS))
    except ValueError:
        raise ValueError(f'must be "dns:///HOST:PORT", not {value!r}') from None
    return target


def grpc_targets(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError('must be a list of addresses such as ["127.0.0.1:50051"] or ["dns:///engines.internal:50051"]')
    targets = tuple(grpc_target(item) for item in value)
    for target in targets:
        if targets.count(target) > 1:
            raise ValueError(f'"{target}" is there twice')
    return targets


def origins(value: object) -> tuple[str, ...]:
    """Origins as browsers send them (RFC 6454), or "*" alone for any."""
    if not isinstance(value, list):
        raise ValueError('must be a list of origins such as ["https://app.example.com"]')
    for item in value:
        if item == "*" and len(value) == 1:
            continue
        if not isinstance(item, str) or not re.fullmatch(r"https?://[a-z0-9.\[\]:_-]+", item):
            raise ValueError(f'{item!r} is no origin; write it as "https://app.example.com", without a path')
    return tuple(value)


def place(base: Path, name: str) -> Path:
    """A path of the file's: relative ones count from `base`, `~` is this user's home."""
    if "\0" in name:
        raise ValueError("holds a character that no path can have")
    try:
        return base / Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f'names a home directory that is not there; write the whole path, not "{name}"') from None


def path(base: Path) -> Callable[[object], Path | None]:
    def parse(value: object) -> Path | None:
        return place(base, text(value))

    return parse


def directories(base: Path) -> Callable[[object], tuple[Path, ...]]:
    """A list of directories, which need not be there yet."""

    def parse(value: object) -> tuple[Path, ...]:
        if not isinstance(value, list):
            raise ValueError('must be a list of directories such as ["/srv/adapters"]')
        return tuple(place(base, text(item)) for item in value)

    return parse


def source(base: Path) -> Callable[[object], str]:
    def parse(value: object) -> str:
        name = text(value)
        try:
            return DEMO if name == DEMO else str(place(base, name).resolve())
        except (OSError, RuntimeError):  # which of them depends on Python's version
            raise ValueError(f"can't be followed; a link in {name} leads back to itself") from None

    return parse


def model_ids(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError('must be a list of ids such as ["apex-haiku-4-20250401"]')
    for item in value:
        if not isinstance(item, str) or not MODEL_ID.fullmatch(item):
            raise ValueError(
                f"{item!r} is no model id; use letters, digits, '.', '_' and '-', at most 128, no '-' first"
            )
        if item.startswith("ft-"):
            raise ValueError(f'"{item}" starts with "ft-", which is kept for fine-tuned models; choose another id')
        if value.count(item) > 1:
            raise ValueError(f'"{item}" is there twice; ids are unique')
    return tuple(value)


def time(value: object) -> datetime:
    """A TOML date-time, or RFC 3339 text; without an offset it is UTC."""
    try:
        time = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        time = None
    if not isinstance(time, datetime):
        raise ValueError(f"must be a time such as 2025-04-01T00:00:00Z, not {value!r}")
    return time.astimezone(UTC) if time.tzinfo else time.replace(tzinfo=UTC)
