"""The operator's login on the admin listener: HTTP Basic (RFC 7617), a slow hash, and patience with failures.

Everything there but the probes is behind it, once a password is set. Without one, a listener that other machines can
reach answers nobody, and one on loopback answers only who calls it by a name of loopback, so that no page in the
operator's browser reaches it under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from aiexport_edge.proto.units import is_loopback
from aiexport_edge.shim.auth.credentials import basic
from aiexport_edge.shim.errors import PermissionDenied, RateLimited, Unauthenticated
from aiexport_edge.shim.store.operator_rows import OperatorLogin

USER = "operator"
MIN_PASSWORD_CHARS = 10
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
# scrypt (RFC 7914) with 2^15 blocks of 8, thrice: 32 MiB and about a fifth of a second.
_LOG_N, _R, _P = 15, 8, 3
_FREE_FAILURES = 5  # of one address; after each further one it waits twice as long
_MAX_WAIT_S = 60.0
_FORGOTTEN_S = 900.0
_MAX_ADDRESSES = 10_000
_CHALLENGE = ((b"www-authenticate", b'Basic realm="AI Export Edge operator", charset="UTF-8"'),)

log = logging.getLogger(__name__)


def hash_password(password: str) -> str:
    """A hash with its parameters and salt in it: `scrypt$log2(n)$r$p$salt$key`, the last two in base64."""
    salt = secrets.token_bytes(16)
    key = _derived(password, salt, _LOG_N, _R, _P)
    parts = (base64.b64encode(part).decode() for part in (salt, key))
    return "$".join(("scrypt", str(_LOG_N), str(_R), str(_P), *parts))


def verify_password(password: str, password_hash: str) -> bool:
    """Whether `hash_password` has made the hash of this password. Takes as long either way."""
    _, log_n, r, p, salt, key = password_hash.split("$")
    derived = _derived(password, base64.b64decode(salt), int(log_n), int(r), int(p))
    return hmac.compare_digest(derived, base64.b64decode(key))


def _derived(password: str, salt: bytes, log_n: int, r: int, p: int) -> bytes:
    memory = 128 * r * (1 << log_n)
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"), salt=salt, n=1 << log_n, r=r, p=p, maxmem=2 * memory, dklen=32
    )


@dataclass(slots=True)
class _Failures:
    count: int
    last: float  # on the gate's clock
    until: float  # nothing is looked at before


class OperatorGate:
    """ASGI middleware around the operator's application. `public`: other machines can reach the listener."""

    def __init__(
        self,
        app: ASGIApp,
        login: OperatorLogin,
        threads: Executor,
        *,
        public: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._login = login
        self._threads = threads
        self._public = public
        self._clock = clock
        self._one_at_a_time = asyncio.Semaphore(1)  # a slow hash takes memory and a processor
        self._process_key = secrets.token_bytes(32)
        self._proven: bytes | None = None  # of the last right password: a scraper need not wait for the slow hash
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            await self._check(scope)
        await self._app(scope, receive, send)

    async def _check(self, scope: Scope) -> None:
        """Raises `Unauthenticated`, `RateLimited`, `PermissionDenied`."""
        loop = asyncio.get_running_loop()
        password_hash = await loop.run_in_executor(self._threads, self._login.password_hash)
        if password_hash is None:
            self._check_without_login(scope)
            return
        address = _network(scope)
        self._check_patience(address)
        try:
            credentials = basic(scope["headers"])
        except ValueError:
            credentials = ("", "")
        if credentials is None:
            raise Unauthenticated(f"Log in as {USER}.", headers=_CHALLENGE)
        if await self._is_right(*credentials, password_hash, address):
            self._failures.pop(address, None)
            return
        log.warning("a login on the admin listener failed, from %s", address)
        self._note_failure(address)
        raise Unauthenticated("The user or the password is wrong.", headers=_CHALLENGE)

    def _check_without_login(self, scope: Scope) -> None:
        if self._public:
            raise PermissionDenied(
                "This listener can be reached from other machines and has no login. Set one with: "
                "aiexport-edge operator password"
            )
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if not is_loopback(name.strip("[]").lower()):
            raise PermissionDenied(
                "Without a login this listener answers to localhost alone. To call it by another name, set one with: "
                "aiexport-edge operator password"
            )

    async def _is_right(self, user: str, password: str, password_hash: str, address: str) -> bool:
        tag = hmac.digest(self._process_key, f"{password_hash}\0{password}".encode("utf-8", "surrogatepass"), "sha256")
        is_user = hmac.compare_digest(user.encode("utf-8", "surrogatepass"), USER.encode())
        if self._proven is not None and hmac.compare_digest(tag, self._proven):
            return is_user
        loop = asyncio.get_running_loop()
        async with self._one_at_a_time:
            self._check_patience(address)  # others of this address may have failed while it waited
            right = await loop.run_in_executor(self._threads, verify_password, password, password_hash)
        if right:
            self._proven = tag
        return right and is_user

    # ------------------------------------------------------------------------------------------ failures

    def _check_patience(self, address: str) -> None:
        failures = self._failures.get(address)
        wait = 0.0 if failures is None else failures.until - self._clock()
        if wait > 0:
            raise RateLimited("Too many logins have failed from this address; wait a little.", retry_after=wait)

    def _note_failure(self, address: str) -> None:
        now = self._clock()
        failures = self._failures.pop(address, None)
        if failures is None or now - failures.last > _FORGOTTEN_S:
            failures = _Failures(0, now, now)
        failures.count += 1
        failures.last = now
        excess = failures.count - _FREE_FAILURES
        failures.until = now + min(_MAX_WAIT_S, 2.0**excess) if excess >= 0 else now
        self._failures[address] = failures
        if len(self._failures) > _MAX_ADDRESSES:
            self._failures.popitem(last=False)


def _network(scope: Scope) -> str:
    """The caller's address; of an IPv6 one its /64, which is one household."""
    client = scope.get("client")
    if client is None:
        return ""
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return str(client[0])
    if address.version == 4:
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
