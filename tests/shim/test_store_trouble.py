"""A full disk, a locked or restarted database, a clock that jumps: a clear 503, and nothing accepted is lost."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, event, func, select
from sqlalchemy import text as sql
from sqlalchemy.exc import OperationalError
from support.postgres import PostgresServer
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto.config import Config
from aiexport_edge.shim.store import Store, StoreError, errors, open_store, usage_rows
from aiexport_edge.shim.store.database import store_url as parsed_store_url
from aiexport_edge.shim.store.schema import generation, usage
from aiexport_edge.shim.store.usage_rows import UsageRows

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]


def message(text: str = "COUNT 5", **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": text}], **fields}


def _overloaded(reply: httpx.Response) -> None:
    assert reply.status_code == 503, reply.text
    assert reply.json()["error"]["type"] == "overloaded_error"
    assert int(reply.headers["retry-after"]) > 0
    for secret in ("disk", "locked", "sqlite", "connection", "/"):
        assert secret not in reply.json()["error"]["message"]


@contextmanager
def on_every_connection(database: Engine, *pragmas: str) -> Iterator[None]:
    """SQLite settings of the test's own, for as long as this lasts."""

    def connect(connection: Any, _record: Any) -> None:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    event.listen(database, "connect", connect)
    database.dispose()
    try:
        yield
    finally:
        event.remove(database, "connect", connect)
        database.dispose()


def _settled(store: Store) -> list[tuple[Any, ...]]:
    with store.database.connect() as connection:
        query = select(usage.c.status, usage.c.output_tokens).order_by(usage.c.created_at)
        return [tuple(row) for row in connection.execute(query)]


def test_a_full_disk(make_engine: Engines, make_shim: Shims, caplog: pytest.LogCaptureFixture) -> None:
    """What runs goes on, and its usage is written when there is room again; what is new is refused at no cost."""
    engine = make_engine()
    shim = make_shim(engine)
    shim.store.update_workspace("acme", requests_per_minute=100, tokens_per_day=10_000)
    engine.pause()
    with shim.client() as client:
        with client.stream("POST", "/v2/messages/stream", json=message("COUNT 9")) as running:
            with shim.store.database.connect() as connection:
                pages = connection.execute(sql("PRAGMA page_count")).scalar()
            with on_every_connection(shim.store.database, f"max_page_count = {pages}"):
                engine.free_run()
                engine.permit(1)
                replies: list[httpx.Response] = []
                while not replies or replies[-1].status_code == 200:  # until what is left of the last page is full
                    replies.append(client.post("/v2/messages", json=message()))
                _overloaded(replies[-1])
                remaining = [int(reply.headers["x-ratelimit-remaining-requests"]) for reply in replies[-2:]]
                assert len(replies) == 1 or remaining[0] == remaining[1]
                text = running.read().decode()
                assert "message_stop" in text
                assert client.get("/v2/models").status_code == 200
                assert client.get("/v2/usage").status_code == 200  # readers go on
            assert "free space on it" in caplog.text
        until(lambda: all(row[0] != "running" for row in _settled(shim.store)), "all usage is written", 60)
        assert client.post("/v2/messages", json=message()).status_code == 200
    completed = [row for row in _settled(shim.store) if row[0] == "completed"]
    assert completed[0] == ("completed", 9)
    assert len(completed) >= len(replies)


def test_a_locked_database(make_engine: Engines, make_shim: Shims, caplog: pytest.LogCaptureFixture) -> None:
    shim = make_shim(make_engine())
    file = str(shim.store.database.url.database)
    with shim.client() as client, on_every_connection(shim.store.database, "busy_timeout = 50"):
        assert client.post("/v2/messages", json=message()).status_code == 200
        holder = sqlite3.connect(file, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        _overloaded(client.post("/v2/messages", json=message()))
        assert client.get("/v2/models").status_code == 200  # readers go on
        holder.execute("ROLLBACK")
        holder.close()
        assert client.post("/v2/messages", json=message()).status_code == 200
        assert "holds the store's lock" in caplog.text
        until(lambda: _settled(shim.store) == [("completed", 5)] * 2, "both are settled")


def test_postgresql_restarts(
    make_engine: Engines, make_shim: Shims, postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Streams go on meanwhile; what could not be written is, afterwards; nothing needs a restart."""

    def on_postgres(config: Config) -> Config:
        url = postgres.url(postgres.new_database())
        return replace(config, store=replace(config.store, url=url))

    engine = make_engine()
    shim = make_shim(engine, configure=on_postgres)
    with shim.client() as client:
        assert client.post("/v2/messages", json=message()).status_code == 200
        engine.pause()
        with client.stream("POST", "/v2/messages/stream", json=message("COUNT 9")) as running:
            postgres.control("stop", "-m", "fast")
            try:
                _overloaded(client.post("/v2/messages", json=message()))
                engine.free_run()
                engine.permit(1)
                assert "message_stop" in running.read().decode()
            finally:
                postgres.start()
        assert client.get("/v2/models").status_code == 200
        assert client.post("/v2/messages", json=message()).status_code == 200
    until(lambda: sorted(_settled(shim.store)) == [("completed", 5)] * 2 + [("completed", 9)], "all is settled", 60)
    assert "check that the database server runs" in caplog.text


def test_what_no_text_of_the_store_can_hold(make_engine: Engines, make_shim: Shims, store_url: str) -> None:
    """U+0000, which PostgreSQL's texts have no room for: it was a 500 wherever a client could send it."""

    def in_store(config: Config) -> Config:
        return replace(config, store=replace(config.store, url=store_url))

    shim = make_shim(make_engine(), configure=in_store)
    shim.config.state.mkdir(exist_ok=True)
    key = shim.store.create_key("acme", scopes=["batch", "keys"]).key
    with shim.client(key) as client:
        batch = {"requests": [{"custom_id": "a\0", **message()}]}
        refused = [
            client.get("/v2/batch?after_id=%00"),
            client.get("/v2/keys?after_id=%00"),
            client.post("/v2/batch", json=batch),
        ]
        missing = [
            client.get("/v2/batch/%00"),
            client.get("/v2/batch/%00/results"),
            client.delete("/v2/batch/%00/cancel"),
            client.post("/v2/keys/%00/rotate"),
            client.delete("/v2/keys/%00"),
            client.get("/v2/models/%00", headers={"X-API-Key": shim.key.key}),
        ]
        form = {"grant_type": "client_credentials", "client_id": "\0", "client_secret": "\0"}
        token = client.post("/v2/oauth/token", data=form)
    assert [reply.status_code for reply in refused] == [400] * 3
    params = [reply.json()["error"]["param"] for reply in refused]
    assert params == ["after_id", "after_id", "requests.0.custom_id"]
    assert [reply.status_code for reply in missing] == [404] * len(missing)
    assert (token.status_code, token.json()["error"]) == (401, "invalid_client")


def test_many_open_an_empty_store_at_once(store_url: str) -> None:
    """One of them migrates it, whichever database it is."""
    script = f"""
from aiexport_edge.shim.store import open_store
store = open_store({store_url!r})
print(store.generation())
store.close()
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert out == "0\n", err
    store = open_store(store_url)
    with store.database.connect() as connection:
        assert connection.execute(select(func.count()).select_from(generation)).scalar() == 1
    store.close()


# ---------------------------------------------------------------------------------------------- clocks


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The wall clock in seconds since 1970 and the monotonic one, as the usage rows read them."""
    now = {"wall": 1_700_000_000.0, "monotonic": 1000.0}
    monkeypatch.setattr(usage_rows, "now_ms", lambda: int(now["wall"] * 1000))

    class Time:
        @staticmethod
        def monotonic() -> float:
            return now["monotonic"]

    monkeypatch.setattr(usage_rows, "time", Time)
    return now


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_clock_that_jumps_kills_nobody(tmp_path: Path, clocks: dict[str, float], jump: float) -> None:
    """A process is dead when its heartbeat stands still, not when the clock says so; and found to be, either way."""
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    alive, dead, other = (UsageRows(store.database, f"proc_{name}") for name in ("alive", "dead", "other"))

    def living() -> set[str]:
        with store.database.connect() as connection:
            return set(connection.execute(sql("SELECT id FROM processes")).scalars())

    for rows in (alive, dead, other):
        rows.save([], [])
    other.settle_dead(timedelta(seconds=15))
    clocks["wall"] += jump
    for _ in range(2):
        for _ in range(2):
            clocks["wall"] += 5
            clocks["monotonic"] += 5
            alive.save([], [])
            other.save([], [])
            other.settle_dead(timedelta(seconds=15))
            assert {"proc_alive", "proc_other"} <= living()
    assert living() == {"proc_alive", "proc_other"}
    store.close()


def test_a_store_that_takes_no_writes_kills_nobody(tmp_path: Path, clocks: dict[str, float]) -> None:
    """Two processes wait for a lock longer than a dead one may be silent: whoever is first finds the other alive."""
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    ledger, alive = (UsageRows(store.database, f"proc_{name}") for name in ("first", "alive"))
    for rows in (ledger, alive):
        rows.save([], [])
    ledger.settle_dead(timedelta(seconds=15))
    for _ in range(5):
        clocks["wall"] += 5
        clocks["monotonic"] += 5
        ledger.doubt()  # its own write has failed
    ledger.save([], [])
    assert ledger.settle_dead(timedelta(seconds=15)) == 0
    clocks["wall"] += 3
    clocks["monotonic"] += 3
    assert ledger.settle_dead(timedelta(seconds=15)) == 0
    with store.database.connect() as connection:
        assert connection.execute(sql("SELECT count(*) FROM processes")).scalar() == 2
    store.close()


# ---------------------------------------------------------------------------------------------- addresses and words


@pytest.mark.parametrize(
    ("url", "read_as"),
    [
        ("postgresql+asyncpg://me@db/edge", "postgresql+psycopg://me@db/edge"),
        ("postgresql://me@db/edge", "postgresql+psycopg://me@db/edge"),
        ("postgres://me@db/edge", "postgresql+psycopg://me@db/edge"),
        ("postgresql+asyncpg://me@db/edge?ssl=require", "postgresql+psycopg://me@db/edge?sslmode=require"),
        ("postgresql+psycopg://me@db/edge?host=%2Frun%2Fpg", "postgresql+psycopg://me@db/edge?host=%2Frun%2Fpg"),
    ],
)
def test_every_spelling_of_postgresql(url: str, read_as: str) -> None:
    assert parsed_store_url(url).render_as_string(hide_password=False) == read_as


@pytest.mark.parametrize("url", ["mysql://db/edge", "nodb://x", "no url"])
def test_other_stores_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="store"):
        open_store(url)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't be opened"):
        open_store(f"postgresql+asyncpg://me@/edge?host={tmp_path}")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (sqlite3.SQLITE_FULL, "free space"),
        (sqlite3.SQLITE_BUSY, "holds the store's lock"),
        (sqlite3.SQLITE_IOERR_WRITE, "disk of the store fails"),
        (sqlite3.SQLITE_CORRUPT, "restore it from a backup"),
    ],
)
def test_the_log_says_what_to_do(code: int, words: str) -> None:
    reason = sqlite3.OperationalError("it broke")
    reason.sqlite_errorcode = code
    error = OperationalError("INSERT INTO secrets VALUES (?)", ("sk",), reason)
    assert words in errors.remedy(error)
    assert "secrets" not in errors.remedy(error)
    assert errors.is_unavailable(error)
