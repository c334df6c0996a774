"""Which addresses of the network this server may call on behalf of a client: the operator's list, and nothing else.

An entry is a host name (at whatever address it has), a block of addresses, or `public`. The caller resolves names, and
asks about an address just before it connects to that very address, so that a name that changes its answer gains
nothing. An IPv6 address that carries an IPv4 one (mapped, NAT64, 6to4, Teredo, ISATAP) is worth no more than that. A
URL's host is read as the C library reads it: `0x7f.1` and `2130706433` are addresses.

The blocks are those of the IANA special-purpose registries (RFC 6890 and its updates), written out: what Python's
`ipaddress` calls global changes with its version.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TypeAlias
from urllib.parse import urlsplit

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

PUBLIC = "public"
MAX_URL_CHARS = 2048
_PORTS = {"http": 80, "https": 443}

_NOT_PUBLIC_4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
_GLOBAL_UNICAST_6 = IPv6Network("2000::/3")  # all that is allocated; the rest is special, local or nobody's
_NOT_PUBLIC_6 = tuple(
    IPv6Network(block)
    for block in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20", "3ffe::/16")
)
_NAT64 = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")
_MAPPED = IPv6Network("::ffff:0:0/96")
_TRANSLATED = IPv6Network("::ffff:0:0:0/96")
_COMPATIBLE = IPv6Network("::/96")
_NEVER_4 = (IPv4Network("0.0.0.0/8"), IPv4Network("224.0.0.0/4"), IPv4Network("240.0.0.0/4"))
_NEVER_6 = (IPv6Network("::/128"), IPv6Network("ff00::/8"))
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)", re.ASCII)


class Forbidden(ValueError):
    """The address or URL may not be called; a phrase that reads on after the field's name."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads. `host` is a lower-case name, or the address that the URL spells out."""

    scheme: str
    host: str
    address: Address | None  # where the host is one
    port: int
    path: str  # with the query

    @property
    def authority(self) -> str:
        """The host and, where it is not the scheme's own, the port; as the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def read_url(url: str) -> Target:
    """Raises `Forbidden` for what is no plain http or https URL."""
    if len(url) > MAX_URL_CHARS:
        raise Forbidden(f"must have at most {MAX_URL_CHARS} characters")
    if not url.isascii() or any(c <= " " or c in '\\"<>^`{|}\x7f' for c in url):
        raise Forbidden("must be a URL in ASCII, without spaces or control characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Forbidden("is not a valid URL") from None
    if parts.scheme not in _PORTS:
        raise Forbidden("must be an http or https URL")
    if "@" in parts.netloc:
        raise Forbidden("must hold no user name or password")
    host = (parts.hostname or "").removesuffix(".")
    if not host or port == 0:
        raise Forbidden("names no host")
    address = read_address(host)
    if address is None and not re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?", host):
        raise Forbidden("names a host that is no valid name or address")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    shown = host if address is None else str(address)
    return Target(parts.scheme, shown, address, port or _PORTS[parts.scheme], path)


def read_address(host: str) -> Address | None:
    """The address that `host` spells, in any notation that inet_aton(3) or inet_pton(3) takes; None for a name."""
    if ":" in host:
        try:
            return IPv6Address(host)  # a zone ("%eth0") is part of it, and kept out by `allows`
        except ValueError:
            raise Forbidden("names a host that is no valid name or address") from None
    parts = host.lower().split(".")
    if not all(_NUMBER.fullmatch(part) for part in parts):
        if _NUMBER.fullmatch(parts[-1]):  # a name can't end in a number (WHATWG URL, ends-in-a-number)
            raise Forbidden("names a host that is no valid name or address")
        return None
    try:
        numbers = [_number(part) for part in parts]
    except ValueError:
        raise Forbidden("names a host that is no valid name or address") from None
    last = 256 ** (5 - len(numbers)) if len(numbers) <= 4 else 0
    if any(number > 255 for number in numbers[:-1]) or numbers[-1] >= last:
        raise Forbidden("names a host that is no valid name or address")
    value = numbers[-1]
    for place, number in enumerate(numbers[:-1]):
        value += number << (8 * (3 - place))
    return IPv4Address(value)


def _number(text: str) -> int:
    if text.startswith("0x"):
        return int(text[2:] or "0", 16)
    return int(text, 8) if text.startswith("0") and len(text) > 1 else int(text)


class AddressPolicy:
    """The operator's list. `rules` as the configuration has read them."""

    def __init__(self, rules: Sequence[str]) -> None:
        self._public = PUBLIC in rules
        self._hosts: set[str] = set()
        self._networks: list[Network] = []
        for rule in rules:
            if rule == PUBLIC:
                continue
            try:
                self._networks.append(ipaddress.ip_network(rule))
            except ValueError:
                self._hosts.add(rule)

    def check(self, url: str) -> Target:
        """Where the URL leads. Raises `Forbidden` where it can never be allowed, whatever its name resolves to."""
        target = read_url(url)
        if target.address is not None:
            if not self.allows(target.host, target.address):
                raise Forbidden("leads to an address that the operator of this server does not allow")
        elif target.host not in self._hosts and not self._could_allow(target.host):
            raise Forbidden("leads to a host that the operator of this server does not allow")
        return target

    def allows(self, host: str, address: Address) -> bool:
        """Whether a connection to `address`, found under the name `host`, may be made."""
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            return False
        carried = _carried(address)
        for each in (address, *carried):
            if any(each in block for block in (_NEVER_4 if isinstance(each, IPv4Address) else _NEVER_6)):
                return False
        if host in self._hosts or any(address in network for network in self._networks):
            return True
        if isinstance(address, IPv6Address) and _is_ipv4_in_disguise(address):
            return all(self._allows_as_it_is(each) for each in carried)
        return self._allows_as_it_is(address) and all(self._allows_as_it_is(each) for each in carried)

    def _allows_as_it_is(self, address: Address) -> bool:
        return any(address in network for network in self._networks) or (self._public and is_public(address))

    def _could_allow(self, name: str) -> bool:
        """Whether any address that the name may have is allowed. Names of this machine have its own (RFC 6761)."""
        if name == "localhost" or name.endswith(".localhost"):
            return self.allows(name, IPv4Address("127.0.0.1")) or self.allows(name, IPv6Address("::1"))
        return self._public or bool(self._networks)


def is_public(address: Address) -> bool:
    """Whether the address is of the open internet, as it stands; what it may carry is another question."""
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _NOT_PUBLIC_4)
    return address in _GLOBAL_UNICAST_6 and not any(address in block for block in _NOT_PUBLIC_6)


def _is_ipv4_in_disguise(address: IPv6Address) -> bool:
    """Addresses that stand for an IPv4 one and nothing else."""
    return any(address in block for block in (_MAPPED, _NAT64))


def _carried(address: Address) -> list[IPv4Address]:
    """The IPv4 addresses that packets to an IPv6 one may end at."""
    if isinstance(address, IPv4Address):
        return []
    number = int(address)
    low = IPv4Address(number & 0xFFFFFFFF)
    carried = []
    if any(address in block for block in (_MAPPED, _NAT64, _NAT64_LOCAL, _TRANSLATED)) or (
        address in _COMPATIBLE and number > 1
    ):
        carried.append(low)
    if address.sixtofour is not None:
        carried.append(address.sixtofour)
    if address.teredo is not None:
        carried += address.teredo
    if (number >> 32) & 0xFFFFFFFF in (0x00005EFE, 0x02005EFE):  # ISATAP, RFC 5214
        carried.append(low)
    return carried
