"""Random traffic through shims that are killed again and again: the sums are the rows', the rows what was replied."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy import text as sql
from support.postgres import PostgresServer
from support.scripted_engine import ScriptedEngine
from support.shim_process import ShimProcess
from support.shim_server import HAIKU, SONNET, until

from aiexport_edge.shim.store import Store, open_store
from aiexport_edge.shim.store.schema import reservations, usage, usage_days

Engines = Callable[..., ScriptedEngine]
COUNTS = ("input_tokens", "cache_read_input_tokens", "output_tokens")


async def _request(
    client: httpx.AsyncClient, base_url: str, random_: random.Random
) -> tuple[str, dict[str, int]] | None:
    """The request's id and what a whole reply reported; None where none came."""
    text = f"COUNT {random_.randrange(1, 60)}"
    body = {"model": random_.choice((HAIKU, SONNET)), "messages": [{"role": "user", "content": text}]}
    leave = random_.random() < 0.2
    used: dict[str, int] = {}
    try:
        if random_.random() < 0.5:
            reply = await client.post(f"{base_url}/v2/messages", json=body)
            return (reply.headers["request-id"], reply.json()["usage"]) if reply.status_code == 200 else None
        async with client.stream("POST", f"{base_url}/v2/messages/stream", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event["type"] == "message_start":
                    used = event["message"]["usage"]
                    if leave:
                        return None
                elif event["type"] == "message_delta":
                    used["output_tokens"] = event["usage"]["output_tokens"]
                elif event["type"] == "message_stop":
                    return response.headers["request-id"], used
    except httpx.HTTPError:  # the shim was killed
        return None
    return None


def _rows(store: Store) -> list[Any]:
    with store.database.connect() as connection:
        return list(connection.execute(select(usage)).mappings())


@pytest.mark.prove
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_storm(make_engine: Engines, tmp_path: Path, request: pytest.FixtureRequest, kind: str) -> None:
    random_ = random.Random(3)
    url = f"sqlite:///{tmp_path}/state/store.db"
    if kind == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres")
        url = postgres.url(postgres.new_database())
    engine = make_engine()
    engine.cached_tokens = 2
    config = tmp_path / "config.toml"
    config.write_text(f'[store]\nurl = "{url}"\n')
    store = open_store(url)
    store.create_workspace("acme", "pro", requests_per_minute=0)
    key = store.create_key("acme").key
    replied: dict[str, dict[str, int]] = {}
    shims = [ShimProcess(tmp_path / "state", config, engine.address, f"shim-{i}") for i in range(2)]
    for shim in shims:
        shim.wait_ready()

    async def traffic(shim: ShimProcess, number: int, kill_after: float | None) -> None:
        async with httpx.AsyncClient(headers={"X-API-Key": key}, timeout=60) as client:
            calls = [asyncio.create_task(_request(client, shim.base_url, random_)) for _ in range(number)]
            if kill_after is not None:
                for done, call in enumerate(asyncio.as_completed(calls)):
                    await call
                    if done >= kill_after * number:
                        shim.kill()
                        break
            for found in await asyncio.gather(*calls):
                if found is not None:
                    replied[found[0]] = found[1]

    try:
        for turn in range(8):
            doomed = ShimProcess(tmp_path / "state", config, engine.address, f"doomed-{turn}")
            doomed.wait_ready()

            async def both(doomed: ShimProcess = doomed) -> None:
                await asyncio.gather(
                    traffic(shims[0], 60, None), traffic(shims[1], 60, None), traffic(doomed, 60, random_.random())
                )

            asyncio.run(both())
            doomed.close()
        with store.database.begin() as connection:  # rather than wait for the silence to pass
            connection.execute(sql("UPDATE processes SET heartbeat_at = heartbeat_at - 60000"))
        until(lambda: all(row["status"] != "running" for row in _rows(store)), "nothing runs any more", 60)
        rows = {row["request_id"]: row for row in _rows(store)}
        assert len(replied) > 500
        for request_id, used in replied.items():
            assert rows[request_id]["status"] == "completed"
            assert {name: rows[request_id][name] for name in COUNTS} == used
        expected: Counter[tuple[str, str]] = Counter()
        for row in rows.values():
            if row["status"] == "completed" or any(row[name] for name in COUNTS):
                expected[row["model"], "requests"] += 1
                for name in (*COUNTS, "cost"):
                    expected[row["model"], name] += row[name]
        with store.database.connect() as connection:
            summed: Counter[tuple[str, str]] = Counter()
            for row in connection.execute(select(usage_days)).mappings():
                for name in ("requests", *COUNTS, "cost"):
                    summed[row["model"], name] += row[name]
            assert connection.execute(select(reservations)).all() == []
        assert summed == expected
        print(
            f"\n{kind}: {len(replied)} whole replies, {len(rows)} rows", Counter(row["status"] for row in rows.values())
        )
    finally:
        for shim in shims:
            shim.close()
        store.close()
