"""Idempotency keys over real worker processes: the first is killed in the middle of its reply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text as sql
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, until
from support.shim_workers import Workers

KEY = {"Idempotency-Key": "once"}
BODY: dict[str, Any] = {"model": HAIKU, "stream": True, "messages": [{"role": "user", "content": "COUNT 9"}]}


@pytest.fixture
def workers(tmp_path: Path, make_engine: Callable[..., ScriptedEngine]) -> Iterator[Workers]:
    made = Workers(tmp_path / "state", make_engine())
    yield made
    made.close()


def kill_in_the_middle(workers: Workers) -> str:
    """A worker dies with a keyed stream half way; returns where another one answers."""
    first, second = workers.start_apart(), workers.start_apart()
    for each in (first, second):
        workers.wait_ready(each.base_url)
    workers.engine.pause()
    workers.engine.permit(2)
    with httpx.Client(base_url=first.base_url, headers={"X-API-Key": workers.key, **KEY}, timeout=60) as client:
        reply = client.send(client.build_request("POST", "/v2/messages", json=BODY), stream=True)
        assert reply.status_code == 200
        pieces = reply.iter_text()
        seen = next(pieces)
        while "content_block_delta" not in seen:
            seen += next(pieces)
        busy = httpx.post(f"{second.base_url}/v2/messages", json=BODY, headers={"X-API-Key": workers.key, **KEY})
        assert busy.status_code == 409
        first.process.kill()
        first.process.wait()
        with pytest.raises(httpx.RemoteProtocolError):
            "".join(pieces)
        reply.close()
    workers.engine.free_run()
    workers.engine.permit(1)
    return second.base_url


def done_once_more_and_replayed(workers: Workers, base_url: str) -> None:
    with httpx.Client(base_url=base_url, headers={"X-API-Key": workers.key, **KEY}, timeout=60) as client:
        replies: list[httpx.Response] = []

        def done() -> bool:
            replies.append(client.post("/v2/messages", json=BODY))
            assert replies[-1].status_code in (200, 409)
            return replies[-1].status_code == 200

        until(done, "the key is free", 60)
        assert "message_stop" in replies[-1].text
        replay = client.post("/v2/messages", json=BODY)
    assert replay.headers["idempotent-replayed"] == "true"
    assert replay.content == replies[-1].content


def test_a_killed_process_frees_its_keys(workers: Workers) -> None:
    """Rather than wait for its silence, its clock is put back."""
    base_url = kill_in_the_middle(workers)
    with workers.store.database.begin() as connection:
        connection.execute(sql("UPDATE processes SET heartbeat_at = heartbeat_at - 60000"))
        connection.execute(sql("UPDATE idempotency SET created_at = created_at - 60000"))
    done_once_more_and_replayed(workers, base_url)


@pytest.mark.prove
def test_it_does_so_within_a_minute(workers: Workers) -> None:
    base_url = kill_in_the_middle(workers)
    killed = time.monotonic()
    done_once_more_and_replayed(workers, base_url)
    print(f"freed after {time.monotonic() - killed:.1f} s")
