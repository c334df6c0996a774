"""Durations, sizes and addresses as people write them, in the configuration file and on the command line.

Owns their grammar. Every function raises `ValueError` with a phrase that reads on after the name of the setting
("must be a duration such as 90d, …"); it does not know where the text came from.
"""

from __future__ import annotations

import ipaddress
import re
from datetime import timedelta

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_BYTES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_FACTORS = {unit.lower(): factor for unit, factor in _BYTES.items()}
_DURATION = re.compile(r"(\d{1,10})([smhd])", re.ASCII)
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,6})?) ?([A-Za-z]*)", re.ASCII)


def parse_duration(text: object) -> timedelta:
    """`90d`, `24h`, `30m` or `45s`; zero is refused."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError(f"must be a duration such as 90d, 24h, 30m or 45s, not {text!r}")
    seconds = int(match[1]) * _SECONDS[match[2]]
    if seconds > 100 * 366 * 86400:
        raise ValueError(f"must be at most 100 years, not {text!r}")
    return timedelta(seconds=seconds)


def format_duration(value: timedelta) -> str:
    """The shortest text that `parse_duration` reads back to `value` (whole seconds)."""
    seconds = int(value.total_seconds())
    for unit in ("d", "h", "m"):
        if seconds % _SECONDS[unit] == 0:
            return f"{seconds // _SECONDS[unit]}{unit}"
    return f"{seconds}s"


def parse_size(value: object) -> int:
    """Bytes from `2GiB`, `512 MiB`, `1.5GB` or a whole number of bytes; zero is refused."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    factor = _FACTORS.get(match[2].lower()) if match else None
    size = int(float(match[1]) * factor) if match and factor and "." in match[1] else 0
    if match and factor and "." not in match[1]:
        size = int(match[1]) * factor
    if size <= 0:
        raise ValueError(f'must be a size such as "2GiB", "512MiB" or a number of bytes, not {value!r}')
    return size


def format_size(size: int) -> str:
    """The shortest exact text that `parse_size` reads back to `size`."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return f"{size}B"


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8401`, `localhost:8401` or `[::1]:8401`."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # an IPv6 address needs its brackets, or its last group would be read as a port
    if not (colon and host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f'must be HOST:PORT such as "127.0.0.1:8401" or "[::1]:8401", not {address!r}')
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`. Names other than localhost are taken to be public."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
