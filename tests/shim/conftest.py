"""Shims in front of scripted engines, over real sockets."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import postgres as postgres_support
from support import redis as redis_support
from support.postgres import PostgresServer, running_server
from support.redis import RedisServer
from support.scripted_engine import ScriptedEngine
from support.shim_server import ShimServer


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ShimServer, ScriptedEngine]]:
    """One shim and engine for tests that leave both as they found them."""
    directory = tmp_path_factory.mktemp("shim")
    engine = ScriptedEngine(f"unix:{directory / 'engine.sock'}")
    engine.start()
    shim = ShimServer(directory / "state", (engine.address,))
    shim.start()
    shim.wait_ready()
    yield shim, engine
    shim.stop()
    engine.close()


@pytest.fixture
def shim(shared: tuple[ShimServer, ScriptedEngine]) -> ShimServer:
    return shared[0]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[Callable[..., ScriptedEngine]]:
    """Engines of a test's own."""
    made: list[ScriptedEngine] = []

    def make(name: str = "engine", **kwargs: Any) -> ScriptedEngine:
        engine = ScriptedEngine(f"unix:{tmp_path / name}.sock", **kwargs)
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def make_shim(tmp_path: Path) -> Iterator[Callable[..., ShimServer]]:
    """Ready shims of a test's own, all with one state directory."""
    made: list[ShimServer] = []

    def make(*engines: ScriptedEngine, **settings: Any) -> ShimServer:
        shim = ShimServer(tmp_path / "state", tuple(engine.address for engine in engines), **settings)
        made.append(shim)
        shim.start()
        shim.wait_ready()
        return shim

    yield make
    for shim in made:
        shim.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with running_server() as server:
        if server is None:
            pytest.skip(postgres_support.MISSING)
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store, in each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/store.db"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.url(server.new_database())


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.skip(redis_support.MISSING)
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()
