"""Which addresses the engines have, over time: fixed ones, and names that are looked up again and again.

A name that can't be looked up, or has no address left, keeps those it had: an outage of the name service takes away no
engine. Knows nothing of connections; it tells whoever asks the whole list, whenever it has changed.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Sequence

from aiexport_edge.proto.units import join_address, split_address
from aiexport_edge.shim.engines.access import Endpoint

FIRST_RETRY_S = 1.0  # while a name has never had an address

log = logging.getLogger(__name__)
Lookup = Callable[[str, int], Awaitable[Sequence[str]]]


class Discovery:
    """`names` are HOST:PORT. `run` for as long as there are any."""

    def __init__(
        self, names: Sequence[str], *, every_s: float, lookup: Lookup | None = None, retry_s: float = FIRST_RETRY_S
    ) -> None:
        self.names = tuple(names)
        self._every_s = every_s
        self._retry_s = retry_s
        self._lookup = lookup or resolve
        self._known: dict[str, tuple[str, ...]] = {}
        self._silent: set[str] = set()  # names that were told of as having no address

    @property
    def endpoints(self) -> list[Endpoint]:
        """What the names have come to, each address once."""
        found: dict[str, Endpoint] = {}
        for name, addresses in self._known.items():
            host, _ = split_address(name)
            for address in addresses:
                found.setdefault(address, Endpoint(address, host))
        return list(found.values())

    async def run(self, tell: Callable[[list[Endpoint]], None]) -> None:
        """Tells the list after each look, until cancelled."""
        while True:
            await asyncio.gather(*(self._look(name) for name in self.names))
            tell(self.endpoints)
            pause = self._every_s if len(self._known) == len(self.names) else min(self._retry_s, self._every_s)
            await asyncio.sleep(pause * random.uniform(0.9, 1.1))  # not all shims in the same instant

    async def _look(self, name: str) -> None:
        host, port = split_address(name)
        try:
            addresses = await self._lookup(host, port)
        except (OSError, UnicodeError) as error:  # the latter of a name that can't be one
            self._tell_silent(name, getattr(error, "strerror", None) or str(error))
            return
        if not addresses:
            self._tell_silent(name, "it has no address")
            return
        self._silent.discard(name)
        found = tuple(sorted(join_address(address, port) for address in set(addresses)))
        if found != self._known.get(name):
            log.info("engines at %s: %s", name, ", ".join(found))
        self._known[name] = found

    def _tell_silent(self, name: str, reason: str) -> None:
        if name not in self._silent:
            self._silent.add(name)
            known = ", ".join(self._known.get(name, ())) or "none"
            log.warning("engines at %s can't be looked up (%s); known so far: %s", name, reason, known)


async def resolve(host: str, port: int) -> Sequence[str]:
    """Every address of a name, as the system's resolver has them. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[4][0]) for address in found]
