"""Idempotency keys over real sockets: replays, conflicts, what frees a key, several processes, dead ones."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import insert
from sqlalchemy import text as sql
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import idempotency
from aiexport_edge.shim.store.database import open_database
from aiexport_edge.shim.store.idempotency_rows import Claim, IdempotencyRows, KeptReply, State, Taken
from aiexport_edge.shim.store.schema import processes
from aiexport_edge.shim.store.store import now_ms

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]


def message(text: str = "COUNT 5", **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "max_tokens": 100, "messages": [{"role": "user", "content": text}], **fields}


def new_key() -> dict[str, str]:
    return {"Idempotency-Key": str(uuid.uuid4())}


def num_usage_rows(shim: ShimServer) -> int:
    with shim.store.database.connect() as connection:
        return int(connection.execute(sql("SELECT count(*) FROM usage")).scalar_one())


def num_keys(shim: ShimServer) -> int:
    with shim.store.database.connect() as connection:
        return int(connection.execute(sql("SELECT count(*) FROM idempotency")).scalar_one())


def without_pings(stream: bytes) -> bytes:
    return stream.replace(b'event: ping\ndata: {"type":"ping"}\n\n', b"")


# ---------------------------------------------------------------------------------------------------- replays


@pytest.mark.parametrize("path", ["/v2/messages", "/v1/messages", "/v2/messages/stream"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_second_time_the_first_reply_is_given_again(
    shared: tuple[ShimServer, ScriptedEngine], path: str, stream: bool
) -> None:
    shim, engine = shared
    key = new_key()
    with shim.client() as client:
        first = client.post(path, json=message("COUNT 30", stream=stream), headers=key)
        submitted, rows = len(engine.seen.submitted), num_usage_rows(shim)
        second = client.post(path, json=message("COUNT 30", stream=stream), headers=key)
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.headers["content-type"] == second.headers["content-type"]
    assert first.headers.get("cache-control") == second.headers.get("cache-control")
    assert without_pings(first.content) == second.content
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert first.headers["request-id"] != second.headers["request-id"]
    assert (len(engine.seen.submitted), num_usage_rows(shim)) == (submitted, rows), "done and billed once"


def test_a_long_stream_comes_back_whole(shim: ShimServer) -> None:
    """Longer than the pieces in which it is sent again."""
    key = new_key()
    with shim.client() as client:
        first = client.post("/v2/messages/stream", json=message("COUNT 2000", max_tokens=2000), headers=key)
        second = client.post("/v2/messages/stream", json=message("COUNT 2000", max_tokens=2000), headers=key)
    assert len(second.content) > 2 * idempotency._PIECE
    assert second.content == without_pings(first.content)


def test_a_replay_costs_no_tokens(make_engine: Engines, make_shim: Shims) -> None:
    """Also where there are none left."""
    shim = make_shim(make_engine())
    shim.store.update_workspace("acme", tokens_per_day=20)
    key = new_key()
    with shim.client() as client:
        first = client.post("/v2/messages", json=message("COUNT 40"), headers=key)
        assert first.status_code == 200
        until(lambda: client.post("/v2/messages", json=message()).status_code == 429, "the tokens are spent")
        second = client.post("/v2/messages", json=message("COUNT 40"), headers=key)
        assert (second.status_code, second.json()) == (200, first.json())
        fresh = new_key()
        for _ in range(2):
            assert client.post("/v2/messages", json=message(), headers=fresh).status_code == 429


def test_keys_belong_to_a_workspace(shared: tuple[ShimServer, ScriptedEngine]) -> None:
    shim, _ = shared
    name = f"w{uuid.uuid4().hex[:12]}"
    shim.store.create_workspace(name, "enterprise")
    other, key = shim.store.create_key(name).key, new_key()
    with shim.client() as mine, shim.client(other) as theirs:
        first = mine.post("/v2/messages", json=message(), headers=key)
        second = theirs.post("/v2/messages", json=message("COUNT 7"), headers=key)
        assert second.status_code == 200
        assert first.json()["id"] != second.json()["id"]
        again = shim.store.create_key("acme").key  # another key of the same workspace
        with shim.client(again) as also_mine:
            assert also_mine.post("/v2/messages", json=message(), headers=key).json() == first.json()


def test_another_body_or_path_is_a_422(shim: ShimServer) -> None:
    key = new_key()
    with shim.client() as client:
        assert client.post("/v2/messages", json=message(), headers=key).status_code == 200
        for path, body in (("/v2/messages", message("COUNT 6")), ("/v1/messages", message())):
            refused = client.post(path, json=body, headers=key)
            assert refused.status_code == 422
            assert refused.json()["error"]["type"] == "invalid_request_error"
            assert refused.json()["error"]["param"] == "Idempotency-Key"


@pytest.mark.parametrize("key", ["", "x" * 256, "caf\u00e9", "tab\there"])
def test_what_is_no_key_is_a_400(shim: ShimServer, key: str) -> None:
    with shim.client() as client:
        raw = [(b"Idempotency-Key", key.encode("latin-1"))]
        refused = client.post("/v2/messages", json=message(), headers=raw)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "Idempotency-Key"
        assert client.post("/v2/messages", json=message(), headers={"Idempotency-Key": "x" * 255}).status_code == 200


def test_credentials_come_before_the_key(shim: ShimServer) -> None:
    with shim.client("axp_live_" + "x" * 43) as stranger:
        assert stranger.post("/v2/messages", json=message(), headers={"Idempotency-Key": ""}).status_code == 401


def test_two_keys_at_once_are_none(shim: ShimServer) -> None:
    with shim.client() as client:
        headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
        assert client.post("/v2/messages", json=message(), headers=headers).status_code == 400


# ---------------------------------------------------------------------------------------------------- while it runs


@contextmanager
def held_stream(
    shim: ShimServer, engine: ScriptedEngine, key: dict[str, str]
) -> Iterator[tuple[httpx.Response, Iterator[str]]]:
    """A stream that has begun and stands still until the engine is let run; and what is still to come of it."""
    engine.pause()
    engine.permit(1)
    body = message(stream=True)
    with shim.client() as client, client.stream("POST", "/v2/messages", json=body, headers=key) as reply:
        seen = ""
        pieces = reply.iter_text()
        while "content_block_delta" not in seen:
            seen += next(pieces)
        yield reply, pieces


def test_while_the_first_runs_the_second_is_a_409(make_engine: Engines, make_shim: Shims) -> None:
    """Also at another process; and 422 wins where it is another request."""
    engine = make_engine()
    shim, other = make_shim(engine), make_shim(engine)
    key = new_key()
    with held_stream(shim, engine, key) as (_, pieces):
        for each in (shim, other):
            with each.client() as client:
                busy = client.post("/v2/messages", json=message(stream=True), headers=key)
                assert busy.status_code == 409
                assert busy.json()["error"]["type"] == "conflict_error"
                assert int(busy.headers["retry-after"]) >= 1
                assert client.post("/v2/messages", json=message(), headers=key).status_code == 422
        engine.free_run()
        engine.permit(1)
        assert "message_stop" in "".join(pieces)
    with other.client() as client:
        replay = client.post("/v2/messages", json=message(stream=True), headers=key)
    assert replay.headers["idempotent-replayed"] == "true"
    assert len(engine.seen.submitted) == 1


def test_many_at_once_run_once(make_engine: Engines, make_shim: Shims, store_url: str) -> None:
    """Over two shims: one is done, the others hear 409 or get its reply."""
    engine = make_engine()
    shims = [
        make_shim(engine, configure=lambda config: replace(config, store=replace(config.store, url=store_url)))
        for _ in range(2)
    ]
    key = new_key()

    async def all_at_once() -> list[httpx.Response]:
        async with httpx.AsyncClient(headers={"X-API-Key": shims[0].key.key, **key}, timeout=60) as client:
            urls = [f"{shims[i % 2].base_url}/v2/messages" for i in range(20)]
            return list(await asyncio.gather(*(client.post(url, json=message()) for url in urls)))

    replies = asyncio.run(all_at_once())
    assert {reply.status_code for reply in replies} <= {200, 409}
    assert len({reply.json()["id"] for reply in replies if reply.status_code == 200}) == 1
    assert len(engine.seen.submitted) == 1
    assert num_usage_rows(shims[0]) == 1


# ---------------------------------------------------------------------------------------------------- what frees a key


def test_what_is_not_a_2xx_frees_the_key(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    key = new_key()
    with shim.client() as client:
        for refusal, status in (
            (pb.ErrorDetail(code=pb.ERROR_INVALID, message="no"), 400),
            (pb.ErrorDetail(code=pb.ERROR_TENANT_QUEUE_FULL), 429),
            (pb.ErrorDetail(code=pb.ERROR_INTERNAL), 500),
            (pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL), 503),
        ):
            engine.refuse = refusal
            assert client.post("/v2/messages", json=message(), headers=key).status_code == status
            assert num_keys(shim) == 0
        assert client.post("/v2/messages", content=b"{", headers=key).status_code == 400
        assert client.post("/v2/messages", json=message(max_tokens=0), headers=key).status_code == 400
        assert client.post("/v2/messages", json=message(model="none"), headers=key).status_code == 404
        assert num_keys(shim) == 0
        engine.refuse = None
        assert client.post("/v2/messages", json=message(), headers=key).status_code == 200
        assert num_keys(shim) == 1


def test_a_stream_that_ends_with_an_error_frees_the_key(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    key = new_key()
    with shim.client() as client:
        engine.fail_after = (2, pb.ErrorDetail(code=pb.ERROR_INTERNAL))
        broken = client.post("/v2/messages", json=message(stream=True), headers=key)
        assert broken.status_code == 200
        assert "event: error" in broken.text
        engine.fail_after = None
        whole = client.post("/v2/messages", json=message(stream=True), headers=key)
        assert "message_stop" in whole.text
        assert "idempotent-replayed" not in whole.headers


def test_a_client_that_leaves_frees_the_key(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    key = new_key()
    with held_stream(shim, engine, key) as (reply, _):
        assert num_keys(shim) == 1
        reply.close()
        engine.wait_for(lambda seen: len(seen.aborted) == 1, "the abort")
    until(lambda: num_keys(shim) == 0, "the key is free")
    engine.free_run()
    with shim.client() as client:
        again = client.post("/v2/messages", json=message(stream=True), headers=key)
    assert "message_stop" in again.text
    assert "idempotent-replayed" not in again.headers


def test_a_reply_too_large_to_keep_is_not_done_again(
    make_engine: Engines, make_shim: Shims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "MAX_KEPT_BYTES", 100)
    engine = make_engine()
    shim = make_shim(engine)
    key = new_key()
    with shim.client() as client:
        for stream in (False, True):
            body, key = message("COUNT 90", stream=stream), new_key()
            assert client.post("/v2/messages", json=body, headers=key).status_code == 200
            submitted = len(engine.seen.submitted)
            second = client.post("/v2/messages", json=body, headers=key)
            assert (second.status_code, second.headers["x-should-retry"]) == (409, "false")
            assert len(engine.seen.submitted) == submitted


def test_without_the_header_nothing_is_kept(shim: ShimServer) -> None:
    before = num_keys(shim)
    with shim.client() as client:
        assert client.post("/v2/messages", json=message()).status_code == 200
    assert num_keys(shim) == before


# ---------------------------------------------------------------------------------------------------- rows

PRINT = b"f" * 32


@pytest.fixture
def two(store_url: str) -> Iterator[tuple[IdempotencyRows, IdempotencyRows, Callable[[str], None]]]:
    """The rows of two processes on one database, and a way to run SQL on it."""
    database = open_database(store_url)

    def run(statement: str) -> None:
        with database.begin() as connection:
            connection.execute(sql(statement))

    with database.begin() as connection:
        connection.execute(
            insert(processes), [{"id": each, "started_at": 0, "heartbeat_at": now_ms()} for each in "ab"]
        )
    yield IdempotencyRows(database, "a"), IdempotencyRows(database, "b"), run
    database.dispose()


Two = tuple[IdempotencyRows, IdempotencyRows, Callable[[str], None]]


def claimed(claim: Claim | Taken) -> Claim:
    assert isinstance(claim, Claim)
    return claim


def test_a_dead_process_frees_its_keys(two: Two) -> None:
    a, b, run = two
    first = claimed(a.claim("w", "k", PRINT))
    assert b.claim("w", "k", PRINT) == Taken(State.RUNNING, PRINT, None)
    run("UPDATE idempotency SET created_at = created_at - 60000")
    assert b.claim("w", "k", PRINT) == Taken(State.RUNNING, PRINT, None), "it is old, its process lives"
    run("UPDATE processes SET heartbeat_at = heartbeat_at - 60000 WHERE id = 'a'")
    assert b.claim("w", "k", PRINT) == Taken(State.RUNNING, PRINT, None), "a clock may have jumped"
    run("DELETE FROM processes WHERE id = 'a'")  # as whoever finds it dead does
    second = claimed(b.claim("w", "k", PRINT))
    a.keep(first, KeptReply(200, "[]", b"late"))  # it was only asleep: the key is not its any more
    a.release(first)
    assert a.claim("w", "k", PRINT) == Taken(State.RUNNING, PRINT, None)
    reply = KeptReply(200, "[]", b"x")
    b.keep(second, reply)
    assert a.claim("w", "k", b"other") == Taken(State.KEPT, PRINT, reply)


def test_a_batch_is_not_made_again_by_who_takes_over(make_engine: Engines, make_shim: Shims) -> None:
    """Its process died after the batch was durable and before the reply was kept."""
    shim = make_shim(make_engine())
    key, body = new_key(), {"requests": [message()]}
    with shim.client() as client:
        made = client.post("/v2/batch", json=body, headers=key).json()
        with shim.store.database.begin() as connection:
            connection.execute(
                sql("UPDATE idempotency SET state = 'running', process_id = 'dead', created_at = 0, body = NULL")
            )
        for _ in range(2):
            again = client.post("/v2/batch", json=body, headers=key)
            assert again.status_code == 202
            assert again.json()["id"] == made["id"]
        assert len(client.get("/v2/batch").json()["data"]) == 1
        assert client.post("/v2/batch", json=body, headers=new_key()).json()["id"] != made["id"]


def test_a_process_that_has_left_frees_its_keys(two: Two) -> None:
    a, b, run = two
    a.claim("w", "k", PRINT)
    run("UPDATE idempotency SET created_at = created_at - 60000")
    run("DELETE FROM processes WHERE id = 'a'")
    claimed(b.claim("w", "k", PRINT))


def test_replies_are_kept_for_a_day(two: Two) -> None:
    a, b, run = two
    a.keep(claimed(a.claim("w", "k", PRINT)), KeptReply(200, "[]", b"x"))
    run("UPDATE idempotency SET expires_at = expires_at - 86000000")
    assert isinstance(b.claim("w", "k", PRINT), Taken)
    run("UPDATE idempotency SET expires_at = expires_at - 1000000")
    claimed(b.claim("w", "k", PRINT))


def test_the_sweep_takes_what_nobody_needs(two: Two) -> None:
    a, b, run = two
    live, lost = claimed(a.claim("w", "live", PRINT)), claimed(a.claim("w", "lost", PRINT))
    a.keep(claimed(a.claim("w", "old", PRINT)), KeptReply(200, "[]", b"x"))
    b.claim("w", "theirs", PRINT)
    run("UPDATE idempotency SET created_at = created_at - 60000")
    run("UPDATE idempotency SET expires_at = 1 WHERE key = 'old'")
    assert a.sweep({live.claim_id}) == 2
    assert isinstance(a.claim("w", "live", PRINT), Taken)
    assert isinstance(a.claim("w", "theirs", PRINT), Taken)
    assert claimed(a.claim("w", "lost", PRINT)).claim_id != lost.claim_id


def test_of_many_that_claim_at_once_one_gets_it(two: Two) -> None:
    a, b, _ = two
    with ThreadPoolExecutor(8) as threads:
        tries = [threads.submit((a, b)[i % 2].claim, "w", f"k{i % 20 // 4}", PRINT) for i in range(40)]
        claims = [each.result() for each in tries]
    won = [claim.key for claim in claims if isinstance(claim, Claim)]
    assert sorted(won) == sorted({f"k{i % 20 // 4}" for i in range(40)})


def test_kept_headers_are_few(shim: ShimServer) -> None:
    key = new_key()
    with shim.client() as client:
        client.post("/v2/messages", json=message(), headers=key)
    with shim.store.database.connect() as connection:
        query = sql("SELECT headers FROM idempotency WHERE key = :key")
        headers = connection.execute(query, {"key": key["Idempotency-Key"]}).scalar_one()
    assert json.loads(headers) == [["content-type", "application/json"]]
