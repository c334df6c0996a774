"""The operator's login on the admin listener: when it is asked for, what passes, and what failures cost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.shim_server import ShimServer

from aiexport_edge.shim.auth import operator
from aiexport_edge.shim.auth.operator import OperatorGate, hash_password, verify_password
from aiexport_edge.shim.errors import ApiError, PermissionDenied, RateLimited, Unauthenticated
from aiexport_edge.shim.store.operator_rows import OperatorLogin

PASSWORD = "correct horse battery"


@pytest.fixture
def login(shim: ShimServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[OperatorLogin]:
    """A password is set; its hash is a cheap one."""
    monkeypatch.setattr(operator, "_LOG_N", 8)
    made = OperatorLogin(shim.store.database)
    made.set(hash_password(PASSWORD))
    yield made
    made.remove()


def test_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = hash_password(PASSWORD)
    assert PASSWORD not in made
    assert len(made) <= 300
    monkeypatch.setattr(operator, "_LOG_N", 8)
    assert verify_password(PASSWORD, made)  # what a hash was made with is in it
    cheap = hash_password(PASSWORD)
    assert cheap != hash_password(PASSWORD)
    assert not verify_password(PASSWORD + " ", cheap)


@settings(max_examples=30, deadline=None)
@given(password=st.text())
def test_any_password_hashes(password: str) -> None:
    cheap = pytest.MonkeyPatch()
    with cheap.context() as patch:
        patch.setattr(operator, "_LOG_N", 4)
        assert verify_password(password, hash_password(password))


def test_with_a_password_all_but_the_probes_asks_for_it(shim: ShimServer, login: OperatorLogin) -> None:
    with httpx.Client(base_url=shim.admin_url) as client:
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == 200
        for path in ("/metrics", "/nothing", "/console"):
            reply = client.get(path)
            assert reply.status_code == 401
            assert reply.headers["www-authenticate"].startswith("Basic ")
            assert reply.json()["error"]["type"] == "authentication_error"
        assert client.get("/metrics", auth=("operator", PASSWORD)).status_code == 200
        assert client.get("/metrics", auth=("operator", PASSWORD)).status_code == 200
        assert client.get("/metrics", auth=("admin", PASSWORD)).status_code == 401
        login.set(hash_password("another password"))
        assert client.get("/metrics", auth=("operator", PASSWORD)).status_code == 401
        assert client.get("/metrics", auth=("operator", "another password")).status_code == 200
        login.remove()
        assert client.get("/metrics").status_code == 200


def test_without_a_password_only_names_of_loopback_are_answered(shim: ShimServer) -> None:
    port = shim.admin_url.rpartition(":")[2]
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", "[::1]", f"[::1]:{port}", "LocalHost"):
        assert httpx.get(f"{shim.admin_url}/metrics", headers={"Host": host}).status_code == 200
    for host in ("rebound.example", f"rebound.example:{port}", "127.0.0.1.example", "0.0.0.0", "[::]"):
        reply = httpx.get(f"{shim.admin_url}/metrics", headers={"Host": host})
        assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error")


# ---------------------------------------------------------------------------------------------------- failures


class Door:
    """A gate of its own, asked from chosen addresses, on a clock that the test moves."""

    def __init__(self, login: OperatorLogin, monkeypatch: pytest.MonkeyPatch, *, public: bool) -> None:
        self.now = 1000.0
        self.hashed: list[str] = []
        monkeypatch.setattr(operator, "verify_password", self._verify)
        self._threads = ThreadPoolExecutor(2)
        self._gate = OperatorGate(self._app, login, self._threads, public=public, clock=lambda: self.now)

    def _verify(self, password: str, password_hash: str) -> bool:
        self.hashed.append(password)
        return password == PASSWORD

    async def _app(self, scope: Any, receive: Any, send: Any) -> None: ...

    def ask(self, *passwords: str, address: str = "192.0.2.1", path: str = "/metrics") -> list[type[ApiError] | None]:
        """What each got, None for being let in; all at once."""

        async def one(password: str) -> type[ApiError] | None:
            credentials = httpx.BasicAuth("operator", password)
            request = next(credentials.auth_flow(httpx.Request("GET", "http://x/")))
            headers = [(b"authorization", request.headers["authorization"].encode())]
            scope = {"type": "http", "path": path, "headers": headers, "client": (address, 1)}
            try:
                await self._gate(scope, None, None)  # type: ignore[arg-type]
            except ApiError as error:
                return type(error)
            return None

        async def every() -> list[type[ApiError] | None]:
            return list(await asyncio.gather(*map(one, passwords)))

        return asyncio.run(every())

    def close(self) -> None:
        self._threads.shutdown()


@pytest.fixture
def door(login: OperatorLogin, monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    made = Door(login, monkeypatch, public=True)
    yield made
    made.close()


def test_failures_make_an_address_wait_twice_as_long_each_time(door: Door) -> None:
    for _ in range(5):
        assert door.ask("wrong") == [Unauthenticated]
    waits = []
    for _ in range(8):
        assert door.ask(PASSWORD) == [RateLimited]
        before = door.now
        while door.ask("wrong") == [RateLimited]:
            door.now += 0.5
        waits.append(door.now - before)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert door.ask(PASSWORD, address="192.0.2.2") == [None]  # another address need not wait
    door.now += 60.0
    assert door.ask(PASSWORD) == [None]
    assert door.ask("wrong") == [Unauthenticated]  # and what had failed is forgotten
    assert door.ask(PASSWORD) == [None]


def test_guesses_at_the_same_time_count_too(door: Door) -> None:
    found = door.ask(*[f"guess {n}" for n in range(40)])
    assert found.count(Unauthenticated) == 5
    assert found.count(RateLimited) == 35
    assert len(door.hashed) == 5


def test_addresses_of_one_network_are_one(door: Door) -> None:
    for n in range(5):
        door.ask("wrong", address=f"2001:db8::{n + 1}")
    assert door.ask(PASSWORD, address="2001:db8::ff") == [RateLimited]
    assert door.ask(PASSWORD, address="2001:db8:0:1::1") == [None]
    for _ in range(5):
        door.ask("wrong", address="::ffff:192.0.2.9")
    assert door.ask(PASSWORD, address="192.0.2.9") == [RateLimited]


def test_a_right_password_is_hashed_once(door: Door) -> None:
    """A scraper asks every few seconds."""
    assert door.ask(PASSWORD) == [None]
    assert door.ask(*[PASSWORD] * 20) == [None] * 20
    assert door.hashed == [PASSWORD]


def test_a_public_listener_without_a_password_answers_nobody(door: Door, login: OperatorLogin) -> None:
    login.remove()
    assert door.ask(PASSWORD) == [PermissionDenied]
    assert door.ask(PASSWORD, path="/healthz") == [None]
