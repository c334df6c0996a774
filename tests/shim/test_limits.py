"""What a workspace may use, over real sockets: requests a minute, tokens a day, and what replies say of both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text as sql
from support.postgres import PostgresServer
from support.redis import RedisServer
from support.scripted_engine import ScriptedEngine
from support.shim_process import ShimProcess
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.config import Config
from aiexport_edge.shim.limits import limits
from aiexport_edge.shim.store import Store, days, open_store, quotas

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
PROMPT = 6  # what the scripted engine makes of "COUNT n"


def message(text: str = "COUNT 5", **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": text}], **fields}


def limits_of(reply: httpx.Response) -> dict[str, int]:
    return {
        name.removeprefix("x-ratelimit-"): int(value)
        for name, value in reply.headers.items()
        if name.startswith("x-ratelimit-")
    }


@pytest.fixture
def engine(make_engine: Engines) -> ScriptedEngine:
    return make_engine()


@pytest.fixture
def shim(engine: ScriptedEngine, make_shim: Shims) -> ShimServer:
    return make_shim(engine)


def set_limits(shim: ShimServer, **changes: Any) -> None:
    """And waits until they hold."""
    shim.store.update_workspace("acme", **changes)
    generation = shim.store.generation()
    until(lambda: shim.services.authenticator._generation == generation, "the change has arrived", 60)


# ---------------------------------------------------------------------------------------------- requests a minute


def test_without_limits_nothing_is_said(shim: ShimServer) -> None:
    with shim.client() as client:
        for reply in (client.get("/v2/models"), client.post("/v2/messages", json=message())):
            assert reply.status_code == 200
            assert limits_of(reply) == {}


def test_headers_and_refusal(shim: ShimServer) -> None:
    set_limits(shim, requests_per_minute=3)
    with shim.client() as client:
        for remaining, path in enumerate(("/v2/models", "/v1/models", f"/v2/models/{HAIKU}")):
            reply = client.get(path)
            assert limits_of(reply) == {
                "limit-requests": 3,
                "remaining-requests": 2 - remaining,
                "reset-requests": 60,
            }
        for refused in (client.get("/v2/models"), client.post("/v2/messages/stream", json=message())):
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert "3 requests a minute" in refused.json()["error"]["message"]
            assert 0 < int(refused.headers["retry-after"]) <= 60
            assert "x-should-retry" not in refused.headers
            assert limits_of(refused)["remaining-requests"] == 0
            assert 0 < limits_of(refused)["reset-requests"] <= 60
        # Whoever is not let in at the door is neither counted nor told anything.
        for headers in ({"X-API-Key": "axp_live_" + "x" * 43}, {"X-API-Key": ""}):
            reply = client.get("/v2/models", headers=headers)
            assert reply.status_code == 401
            assert limits_of(reply) == {}
        assert client.get("/healthz").status_code == 200


def test_what_counts(shim: ShimServer, engine: ScriptedEngine) -> None:
    """Bad requests do; refusals and what could not be served do not."""
    set_limits(shim, requests_per_minute=10)
    with shim.client() as client:

        def remaining(reply: httpx.Response, status: int) -> int:
            assert reply.status_code == status, reply.text
            return limits_of(reply)["remaining-requests"]

        assert remaining(client.post("/v2/messages", json={}), 400) == 9
        assert remaining(client.get("/v2/models/none"), 404) == 8
        narrow = shim.store.create_key("acme", scopes=["usage"])
        assert remaining(client.get("/v2/models", headers={"X-API-Key": narrow.key}), 403) == 7
        engine.refuse = pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL)
        assert remaining(client.post("/v2/messages", json=message()), 503) == 7
        engine.refuse = pb.ErrorDetail(code=pb.ERROR_TENANT_QUEUE_FULL)
        assert remaining(client.post("/v2/messages", json=message()), 429) == 7
        engine.refuse = None
        assert remaining(client.post("/v2/messages", json=message()), 200) == 6


def test_changes_hold_within_a_second(shim: ShimServer) -> None:
    with shim.client() as client:
        set_limits(shim, requests_per_minute=1)
        assert [client.get("/v2/models").status_code for _ in range(2)] == [200, 429]
        set_limits(shim, requests_per_minute=0)
        assert limits_of(client.get("/v2/models")) == {}
        set_limits(shim, requests_per_minute=None, plan="pro")
        assert limits_of(client.get("/v2/models")) | {"reset-tokens": 0} == {
            "limit-requests": 600,
            "remaining-requests": 598,  # the one that passed while the limit was 1, and this one
            "reset-requests": 60,
            "limit-tokens": 10_000_000,
            "remaining-tokens": 10_000_000,
            "reset-tokens": 0,
        }
    assert limits.FRESH_S <= 1.0


def _configured(directory: Path, store_url: str, more: str = "") -> Path:
    config = directory / "config.toml"
    config.write_text(f'[store]\nurl = "{store_url}"\n{more}')
    return config


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, engine: ScriptedEngine
) -> Iterator[tuple[Store, list[ShimProcess]]]:
    """Two shim processes; with PostgreSQL and Redis as on two machines, each with a state directory of its own."""
    url, more = f"sqlite:///{tmp_path}/state/store.db", ""
    if request.param == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        url = postgres.url(postgres.new_database())
    elif request.param == "redis":
        redis: RedisServer = request.getfixturevalue("redis")
        more = f'[limits]\nredis_url = "{redis.url}"\nredis_timeout = "60s"\n'
    config = _configured(tmp_path, url, more)
    store = open_store(url)
    store.create_workspace("acme", "enterprise")
    states = [tmp_path / ("state" if request.param == "sqlite" else f"state-{name}") for name in ("a", "b")]
    processes = [ShimProcess(state, config, engine.address, f"worker-{i}") for i, state in enumerate(states)]
    for process in processes:
        process.wait_ready()
    yield store, processes
    for process in processes:
        process.close()
    store.close()


async def _all_at_once(processes: list[ShimProcess], key: str, count: int, path: str) -> list[httpx.Response]:
    async with httpx.AsyncClient(headers={"X-API-Key": key}, timeout=60) as client:
        urls = [processes[i % len(processes)].base_url + path for i in range(count)]
        return await asyncio.gather(*(client.get(url) for url in urls))


# ---------------------------------------------------------------------------------------------- tokens a day


def test_tokens_are_reserved_settled_and_spent(shim: ShimServer, engine: ScriptedEngine) -> None:
    set_limits(shim, tokens_per_day=50)
    engine.cached_tokens = 2
    with shim.client() as client:
        for used in (PROMPT + 7, 2 * (PROMPT + 7), 3 * (PROMPT + 7)):
            reply = client.post("/v2/messages", json=message("COUNT 7", max_tokens=20))
            assert reply.status_code == 200
            said = limits_of(reply)
            assert (said["limit-tokens"], said["remaining-tokens"]) == (50, 50 - used)
            assert 0 < said["reset-tokens"] <= 86_400
            assert (_standing(shim).used, _standing(shim).reserved) == (used, 0)
        # 11 are left; the last one may overrun.
        assert client.post("/v2/messages", json=message("COUNT 30", max_tokens=40)).status_code == 200
        assert _standing(shim).used == 39 + PROMPT + 30
        for path in ("/v2/messages", "/v2/messages/stream", "/v1/messages"):
            refused = client.post(path, json=message())
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert "50 tokens" in refused.json()["error"]["message"]
            assert refused.headers["x-should-retry"] == "false"
            assert abs(int(refused.headers["retry-after"]) - (86_400 - time.time() % 86_400)) < 60
            assert limits_of(refused)["remaining-tokens"] == 0
        assert len(engine.seen.submitted) == 4
        assert client.get("/v2/models").status_code == 200  # it uses none
        # A larger quota holds at once.
        set_limits(shim, tokens_per_day=500)
        assert client.post("/v2/messages", json=message()).status_code == 200


def _standing(shim: ShimServer) -> quotas.Standing:
    workspace_id = shim.store.get_workspace("acme").id
    return quotas.read_standing(shim.store.database, workspace_id, days.today())


def test_what_is_in_flight_is_reserved(shim: ShimServer, engine: ScriptedEngine) -> None:
    """A refusal because of it passes, and says so; the request leaves the engine, and costs no request."""
    set_limits(shim, tokens_per_day=100, requests_per_minute=10)
    engine.pause()
    with (
        shim.client() as client,
        client.stream("POST", "/v2/messages/stream", json=message("COUNT 9", max_tokens=94)) as running,
    ):
        assert limits_of(running)["remaining-tokens"] == 0
        refused = client.post("/v2/messages", json=message())
        assert refused.status_code == 429
        assert "x-should-retry" not in refused.headers
        assert int(refused.headers["retry-after"]) < 10
        assert limits_of(refused)["remaining-requests"] == 9
        engine.wait_for(lambda seen: len(seen.aborted) == 1, "the refused one leaves the engine")
        engine.free_run()
        engine.permit(1)
        running.read()
        until(lambda: _standing(shim) == replace(_standing(shim), used=PROMPT + 9, reserved=0), "it is settled")
        assert client.post("/v2/messages", json=message("COUNT 2", max_tokens=2)).status_code == 200


def test_a_cut_stream_counts_what_it_got(shim: ShimServer, engine: ScriptedEngine) -> None:
    set_limits(shim, tokens_per_day=1000)
    engine.pause()
    engine.permit(4)
    with shim.client() as client, client.stream("POST", "/v2/messages/stream", json=message("COUNT 9")) as reply:
        for piece in reply.iter_text():
            if "3 " in piece:
                break
    until(lambda: _standing(shim).reserved == 0, "it is settled")
    assert _standing(shim).used == PROMPT + 4


def test_another_day_is_another_quota(shim: ShimServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Days are the wall clock's; a clock that is set back finds the old day as it was."""
    set_limits(shim, tokens_per_day=10)
    with shim.client() as client:
        assert client.post("/v2/messages", json=message()).status_code == 200
        assert _standing(shim).used == PROMPT + 5
        assert client.post("/v2/messages", json=message()).status_code == 429
        real = days.today()
        monkeypatch.setattr(limits, "today", lambda: real + 1)
        reply = client.post("/v2/messages/stream", json=message(max_tokens=1))
        assert reply.status_code == 200
        assert limits_of(reply)["remaining-tokens"] == 10 - PROMPT - 1  # as of the stream's beginning: all is reserved
        monkeypatch.setattr(limits, "today", lambda: real)
        assert client.post("/v2/messages", json=message()).status_code == 429


def twenty_at_once_at_a_limit_of_five(pair: tuple[Store, list[ShimProcess]]) -> None:
    store, processes = pair
    store.update_workspace("acme", requests_per_minute=5)
    keys = [store.create_key("acme").key for _ in range(2)]
    replies = asyncio.run(_all_at_once(processes, keys[0], 20, "/v2/models"))
    assert sorted(reply.status_code for reply in replies) == [200] * 5 + [429] * 15
    assert sorted(limits_of(reply)["remaining-requests"] for reply in replies) == [0] * 16 + [1, 2, 3, 4]
    # Over all the workspace's keys.
    assert httpx.get(f"{processes[1].base_url}/v2/models", headers={"X-API-Key": keys[1]}).status_code == 429


def parallel_requests_overrun_by_at_most_one(pair: tuple[Store, list[ShimProcess]], engine: ScriptedEngine) -> None:
    """Over two processes; whatever is let in together has fitted but for the last."""
    store, processes = pair
    quota, each = 100, PROMPT + 24
    store.update_workspace("acme", requests_per_minute=0, tokens_per_day=quota)
    key = store.create_key("acme").key
    engine.hold_starts(True)

    async def run() -> list[int]:
        async with httpx.AsyncClient(headers={"X-API-Key": key}, timeout=60) as client:
            calls = [
                asyncio.create_task(
                    client.post(processes[i % 2].base_url + "/v2/messages", json=message("COUNT 50", max_tokens=24))
                )
                for i in range(20)
            ]
            for refused in range(1, 17):  # four fit: 90 are reserved when the fourth comes
                while sum(call.done() for call in calls) < refused:
                    await asyncio.wait([call for call in calls if not call.done()], return_when="FIRST_COMPLETED")
            engine.hold_starts(False)
            return [reply.status_code for reply in await asyncio.gather(*calls)]

    statuses = asyncio.run(run())
    assert sorted(statuses) == [200] * 4 + [429] * 16
    workspace_id = store.get_workspace("acme").id

    def used() -> int:
        return quotas.read_standing(store.database, workspace_id, days.today()).used

    until(lambda: used() == 4 * each, "all are settled")
    assert quota <= used() < quota + each


def test_over_two_processes(pair: tuple[Store, list[ShimProcess]], engine: ScriptedEngine) -> None:
    """Both limits, exact; in one test, for the processes take long to start."""
    twenty_at_once_at_a_limit_of_five(pair)
    parallel_requests_overrun_by_at_most_one(pair, engine)


def test_a_killed_process_lets_go_of_what_it_reserved(engine: ScriptedEngine, tmp_path: Path) -> None:
    """What its streams had got stays used; another process settles it."""
    state = tmp_path / "state"
    url = f"sqlite:///{state}/store.db"
    config = _configured(tmp_path, url)
    store = open_store(url)
    store.create_workspace("acme", "pro", tokens_per_day=1000)
    key = store.create_key("acme").key
    workspace_id = store.get_workspace("acme").id
    first = ShimProcess(state, config, engine.address, "first")
    second = ShimProcess(state, config, engine.address, "second")
    try:
        for process in (first, second):
            process.wait_ready()
        engine.pause()
        engine.permit(3)

        def standing() -> tuple[int, int]:
            found = quotas.read_standing(store.database, workspace_id, days.today())
            return found.used, found.reserved

        with httpx.Client(headers={"X-API-Key": key}, timeout=60) as client:
            url = f"{first.base_url}/v2/messages/stream"
            reply = client.send(client.build_request("POST", url, json=message("COUNT 9", max_tokens=50)), stream=True)
            assert standing() == (0, PROMPT + 50)

            def checkpointed() -> bool:
                with store.database.connect() as connection:
                    return connection.execute(sql("SELECT output_tokens FROM usage")).scalar() == 3

            until(checkpointed, "three tokens are written")
            first.kill()
            reply.close()
        with store.database.begin() as connection:  # rather than wait for the silence to pass
            connection.execute(
                sql(
                    "UPDATE processes SET heartbeat_at = heartbeat_at - 60000 WHERE id = (SELECT process_id FROM usage)"
                )
            )
        until(lambda: standing() == (PROMPT + 3, 0), "it is settled and released", 60)
    finally:
        first.close()
        second.close()
        store.close()


def test_a_quota_from_the_plan(engine: ScriptedEngine, make_shim: Shims) -> None:
    def small(config: Config) -> Config:
        plans = dict(config.plans)
        plans["pro"] = replace(plans["pro"], requests_per_minute=7, tokens_per_day=77)
        return replace(config, plans=plans)

    shim = make_shim(engine, configure=small)
    set_limits(shim, plan="pro")
    with shim.client() as client:
        said = limits_of(client.get("/v2/models"))
    assert (said["limit-requests"], said["limit-tokens"]) == (7, 77)
