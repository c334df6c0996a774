"""/v2/batch over real sockets: what is accepted, what is refused and where, how a batch goes, ends and is read."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select, update
from standardwebhooks import Webhook
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, SONNET, ShimServer
from support.webhook_receiver import receiving

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.config import Config
from aiexport_edge.shim.batches.pace import FIRST_WINDOW
from aiexport_edge.shim.cli.main import main
from aiexport_edge.shim.store import batch_sweep
from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.rows import now_ms
from aiexport_edge.shim.store.schema import batch_bodies, batch_items, batches, usage
from aiexport_edge.shim.store.webhook_rows import WebhookRows

Shim = Callable[..., ShimServer]
Engine = Callable[..., ScriptedEngine]


@pytest.fixture
def engine(make_engine: Engine) -> ScriptedEngine:
    return make_engine()


@pytest.fixture
def client(make_shim: Shim, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    """A client of a shim of the test's own; `shim_of` finds the shim."""
    shim = make_shim(engine)
    with shim.client() as client:
        client.shim = shim  # type: ignore[attr-defined]
        yield client


def shim_of(client: httpx.Client) -> ShimServer:
    shim: ShimServer = client.shim  # type: ignore[attr-defined]
    return shim


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Polls until `condition` holds; a call over HTTP each time, so not too often."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.05)


def body(text: str = "COUNT 2", **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "max_tokens": 16, "messages": [{"role": "user", "content": text}], **fields}


def create(client: httpx.Client, *requests: dict[str, Any], **fields: Any) -> dict[str, Any]:
    reply = client.post("/v2/batch", json={"requests": list(requests), **fields})
    assert reply.status_code == 202, reply.text
    batch: dict[str, Any] = reply.json()
    return batch


def show(client: httpx.Client, batch: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v2/batch/{batch['id']}").raise_for_status().json()
    counts = dict(found["request_counts"])
    assert counts.pop("total") == sum(counts.values()), counts
    return found


def ended(client: httpx.Client, batch: dict[str, Any]) -> dict[str, Any]:
    until(lambda: show(client, batch)["ended_at"] is not None, "the batch ends")
    return show(client, batch)


def results(client: httpx.Client, batch: dict[str, Any]) -> list[dict[str, Any]]:
    reply = client.get(f"/v2/batch/{batch['id']}/results").raise_for_status()
    assert reply.headers["content-type"].startswith("application/x-jsonl")
    return [json.loads(line) for line in reply.text.splitlines()]


# ---------------------------------------------------------------------------------------------- how a batch goes


def test_a_batch_from_acceptance_to_results(client: httpx.Client) -> None:
    """Flat and `params` forms, with and without custom_id; `stream` is ignored; a request's own fault is its result."""
    made = create(
        client,
        body("COUNT 3", custom_id="flat", stream="whatever"),
        {"custom_id": "nested", "params": body("COUNT 2", model="apex-sonnet-4")},
        {"params": body("COUNT 1", stream=True)},
        body("word " * 5000, custom_id="too long"),
    )
    assert made["type"] == "batch"
    assert made["id"].startswith("batch_")
    assert made["status"] == "queued"
    assert made["request_counts"] == {
        "total": 4,
        "queued": 4,
        "processing": 0,
        "succeeded": 0,
        "errored": 0,
        "canceled": 0,
        "expired": 0,
    }
    assert made["started_at"] is made["ended_at"] is made["webhook_url"] is None
    created, expires = (datetime.fromisoformat(made[name]) for name in ("created_at", "expires_at"))
    assert expires - created == timedelta(hours=24)
    found = ended(client, made)
    assert found["status"] == "completed"
    assert (found["request_counts"]["succeeded"], found["request_counts"]["errored"]) == (3, 1)
    assert found["created_at"] <= found["started_at"] <= found["ended_at"]
    flat, nested, bare, long = results(client, made)
    assert [line["index"] for line in (flat, nested, bare, long)] == [0, 1, 2, 3]
    assert [line["custom_id"] for line in (flat, nested, bare, long)] == ["flat", "nested", None, "too long"]
    message = flat["result"]["message"]
    assert flat["result"] == {"type": "succeeded", "message": message}
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": HAIKU,
        "content": [{"type": "text", "text": "0 1 2 "}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 6, "cache_read_input_tokens": 0, "output_tokens": 3},
    }
    assert nested["result"]["message"]["model"] == "apex-sonnet-4"
    assert long["result"]["type"] == "errored"
    assert long["result"]["error"]["type"] == "invalid_request_error"
    assert long["result"]["error"]["param"] == "messages"
    assert "4096" in long["result"]["error"]["message"]


def test_requests_run_below_interactive_work(client: httpx.Client, engine: ScriptedEngine) -> None:
    ended(client, create(client, body()))
    client.post("/v2/messages", json=body()).raise_for_status()
    first, second = (submit.request for submit in engine.seen.submitted)
    assert (first.priority, second.priority) == (pb.PRIORITY_BATCH, pb.PRIORITY_INTERACTIVE)
    assert (first.tenant.id, first.tenant.weight, first.tenant.cache_salt) == (
        second.tenant.id,
        second.tenant.weight,
        second.tenant.cache_salt,
    )


def test_usage_is_that_of_the_results_at_half_the_price(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.cached_tokens = 2
    bodies = [body(f"COUNT {n}") for n in (1, 2, 3)]
    bodies[1]["model"] = HAIKU.rpartition("-")[0]  # the alias counts as the id that it stands for
    batch = ended(client, create(client, *bodies, body("word " * 5000)))
    sums = {"input_tokens": 12, "cache_read_input_tokens": 6, "output_tokens": 6}
    messages = [line["result"]["message"]["usage"] for line in results(client, batch)[:3]]
    assert {name: sum(message[name] for message in messages) for name in sums} == sums
    used = client.get("/v2/usage?group_by=model").json()
    assert [row["group"] for row in used["data"]] == [HAIKU]
    total = used["total"]
    assert {name: total[name] for name in sums} == sums
    assert total["requests"] == 3
    assert float(total["cost_usd"]) == pytest.approx((18 * 0.25 + 6 * 1.25) / 2 / 1e6)


def test_a_batch_for_which_the_disk_has_no_room_is_a_503(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one so small that its spool is written only when all has been read: closing that once more was a 500."""
    with monkeypatch.context() as full:
        full.setattr("aiexport_edge.shim.batches.intake.tempfile.TemporaryFile", lambda dir: open("/dev/full", "r+b"))  # noqa: SIM115
        for num_requests in (1, 500):
            reply = client.post("/v2/batch", json={"requests": [body("x" * 1000)] * num_requests})
            assert (reply.status_code, reply.json()["error"]["type"]) == (503, "overloaded_error")
            assert int(reply.headers["retry-after"]) > 0
    assert client.get("/v2/batch").json()["data"] == []
    create(client, body())


def test_results_before_the_end_are_a_409(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.pause()
    batch = create(client, body("COUNT 2"))
    until(lambda: show(client, batch)["request_counts"]["processing"] == 1, "it runs")
    assert show(client, batch)["status"] == "in_progress"
    early = client.get(f"/v2/batch/{batch['id']}/results")
    assert (early.status_code, early.json()["error"]["type"]) == (409, "conflict_error")
    engine.free_run()
    engine.permit(10)
    assert len(results(client, ended(client, batch))) == 1


def test_listing_is_newest_first_in_pages(client: httpx.Client) -> None:
    made = [create(client, body())["id"] for _ in range(5)]
    page = client.get("/v2/batch?limit=2").json()
    assert [batch["id"] for batch in page["data"]] == [page["first_id"], page["last_id"]]
    assert page["has_more"] is True
    seen = [batch["id"] for batch in page["data"]]
    while page["has_more"]:
        page = client.get("/v2/batch", params={"limit": 2, "after_id": page["last_id"]}).json()
        seen += [batch["id"] for batch in page["data"]]
    assert sorted(seen) == sorted(made)
    assert len(seen) == 5
    for query in ("limit=0", "limit=101", "limit=x", "after_id=batch_nope"):
        assert client.get(f"/v2/batch?{query}").status_code == 400


def test_another_workspaces_batch_is_not_there(client: httpx.Client) -> None:
    shim = shim_of(client)
    batch = ended(client, create(client, body()))
    shim.store.create_workspace("rival", "enterprise")
    with shim.client(shim.store.create_key("rival").key) as rival:
        theirs = [
            rival.get(f"/v2/batch/{batch['id']}"),
            rival.get(f"/v2/batch/{batch['id']}/results"),
            rival.delete(f"/v2/batch/{batch['id']}/cancel"),
        ]
        nobodys = [
            rival.get("/v2/batch/batch_0"),
            rival.get("/v2/batch/batch_0/results"),
            rival.delete("/v2/batch/batch_0/cancel"),
        ]
        assert [reply.status_code for reply in theirs + nobodys] == [404] * 6
        for their, nobody in zip(theirs, nobodys, strict=True):
            assert their.json()["error"]["message"] == nobody.json()["error"]["message"].replace("batch_0", batch["id"])
        assert rival.get("/v2/batch").json()["data"] == []
        assert rival.get("/v2/batch", params={"after_id": batch["id"]}).status_code == 400


def test_the_scope_batch_is_needed(client: httpx.Client) -> None:
    shim = shim_of(client)
    with shim.client(shim.store.create_key("acme", scopes=["messages"]).key) as weak:
        for reply in (weak.post("/v2/batch", content=b"nonsense"), weak.get("/v2/batch"), weak.get("/v2/batch/x")):
            assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error")


def test_a_small_batch_need_not_wait_for_anothers_large_one(client: httpx.Client, engine: ScriptedEngine) -> None:
    """Turns go to the workspace that has least under way, not to who came first."""
    shim = shim_of(client)
    shim.store.create_workspace("small", "enterprise")
    engine.hold_starts(True)
    large = create(client, *([body("COUNT 1")] * 200))
    until(lambda: show(client, large)["request_counts"]["processing"] == FIRST_WINDOW, "the large one is under way")
    with shim.client(shim.store.create_key("small").key) as other:
        small = create(other, *([body("COUNT 2")] * 4))
        engine.hold_starts(False)
        ended(other, small)
        ended(client, large)
    texts = [submit.request.chat.messages[0].content[0].text for submit in engine.seen.submitted]
    assert [n for n, text in enumerate(texts) if text == "COUNT 2"][-1] < 50


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("requests", "status", "param"),
    [
        (None, 400, "requests"),
        ([], 400, "requests"),
        ({}, 400, "requests"),
        ("x", 400, "requests"),
        ([body(), 5], 400, "requests.1"),
        ([body(), None], 400, "requests.1"),
        ([body(), body(model="nope")], 400, "requests.1.model"),
        ([body(), {"custom_id": "a"}], 400, "requests.1.model"),
        ([body(), {"params": body(model="nope")}], 400, "requests.1.params.model"),
        ([body(), {"params": 3}], 400, "requests.1.params"),
        (
            [body()] * 17 + [body(messages=[{"role": "user", "content": [{"type": "x"}]}])],
            400,
            "requests.17.messages.0.content.0.type",
        ),
        ([body(), body(max_tokens=5000)], 400, "requests.1.max_tokens"),
        ([body(), body(max_tokens=0)], 400, "requests.1.max_tokens"),
        ([body(), body(tools=[])], 400, "requests.1.tools"),
        ([body(), body(response_format={"type": "json_object"})], 400, "requests.1.response_format.type"),
        ([body(), body(temperature=2)], 400, "requests.1.temperature"),
        ([body(custom_id="a"), body(custom_id="b"), body(custom_id="a")], 400, "requests.2.custom_id"),
        ([body(custom_id="")], 400, "requests.0.custom_id"),
        ([body(custom_id="x" * 65)], 400, "requests.0.custom_id"),
        ([body(custom_id=7)], 400, "requests.0.custom_id"),
        ([body(), body(messages=[{"role": "user", "content": "\ud800"}])], 400, "requests.1.messages.0.content"),
    ],
)
def test_one_bad_request_refuses_the_whole_call_and_is_named(
    shim: ShimServer, requests: Any, status: int, param: str
) -> None:
    with shim.client() as client:
        before = client.get("/v2/batch").json()["first_id"]
        reply = client.post("/v2/batch", content=json.dumps({"requests": requests}))
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text
        assert reply.json()["error"]["message"].startswith(f"{param}: ")
        assert client.get("/v2/batch").json()["first_id"] == before


def test_custom_ids_of_64_characters_are_fine(client: httpx.Client) -> None:
    create(client, body(custom_id="é" * 64), body(custom_id="x"), body(custom_id=None), body())


def test_a_plan_bounds_size_and_models(client: httpx.Client) -> None:
    shim = shim_of(client)
    shim.store.create_workspace("small", "free")
    with shim.client(shim.store.create_key("small").key) as small:
        too_many = small.post("/v2/batch", json={"requests": [body()] * 101})
        assert (too_many.status_code, too_many.json()["error"]["param"]) == (400, "requests")
        assert "100" in too_many.json()["error"]["message"]
        forbidden = small.post("/v2/batch", json={"requests": [body(), body(model=SONNET)]})
        assert (forbidden.status_code, forbidden.json()["error"]["param"]) == (403, "requests.1.model")
        assert small.post("/v2/batch", json={"requests": [body("COUNT 1")] * 100}).status_code == 202


@pytest.mark.parametrize(
    "sent", [b"", b"{", b"[]", b'{"requests":[{}]', b'{"requests":[{"a":NaN}]}', b"\xff\xfe", b"{}x"]
)
def test_bodies_that_are_no_json(shim: ShimServer, sent: bytes) -> None:
    with shim.client() as client:
        reply = client.post("/v2/batch", content=sent)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
        assert client.post("/v2/batch", content=sent, headers={"content-type": "text/csv"}).status_code == 415


@pytest.mark.parametrize(
    "url", ["http://169.254.169.254/", "ftp://x/", "http://localhost/", 5, "http://0x7f.1/", "x" * 3000]
)
def test_a_webhook_url_that_can_never_be_called(shim: ShimServer, url: Any) -> None:
    with shim.client() as client:
        reply = client.post("/v2/batch", json={"requests": [body()], "webhook_url": url})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "webhook_url")


def test_without_room_for_the_spool_it_is_a_503(make_shim: Shim, engine: ScriptedEngine, tmp_path: Path) -> None:
    shim = make_shim(engine)
    shim.services.config = replace(shim.config, state=tmp_path / "gone")
    with shim.client() as client:
        reply = client.post("/v2/batch", json={"requests": [body()]})
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "overloaded_error")
        assert str(tmp_path) not in reply.text
        shim.services.config = shim.config
        assert client.post("/v2/batch", json={"requests": [body()]}).status_code == 202


def test_bounds_on_the_body(make_shim: Shim, engine: ScriptedEngine) -> None:
    def smaller(config: Config) -> Config:
        return replace(
            config,
            shim=replace(config.shim, max_body_bytes=20_000),
            batches=replace(config.batches, max_body_bytes=50_000),
        )

    shim = make_shim(engine, configure=smaller)
    with shim.client() as client:
        assert client.post("/v2/batch", json={"requests": [body("COUNT 1 " + "x" * 9_000)] * 5}).status_code == 202
        whole = client.post("/v2/batch", json={"requests": [body("x" * 9_000)] * 6})
        chunked = client.post("/v2/batch", content=iter([b'{"requests":[', b" " * 60_000]))
        one = client.post("/v2/batch", json={"requests": [body(), body("x" * 21_000)]})
        assert [reply.status_code for reply in (whole, chunked, one)] == [413] * 3
        assert one.json()["error"]["param"] == "requests.1"
        assert shim.services.bodies.used == shim.services.batch_spool.used == 0


# ---------------------------------------------------------------------------------------------- ends


def test_cancel_ends_what_runs_and_keeps_what_has_finished(client: httpx.Client, engine: ScriptedEngine) -> None:
    batch = create(client, body("COUNT 1"))
    done = ended(client, batch)
    assert client.delete(f"/v2/batch/{batch['id']}/cancel").json() == done  # one that has ended stays as it is
    engine.pause()
    batch = create(client, body("COUNT 0"), *([body("COUNT 4")] * 40))
    until(lambda: show(client, batch)["request_counts"]["succeeded"] == 1, "the first has finished")
    until(lambda: show(client, batch)["request_counts"]["processing"] >= 4, "others run")
    submitted = len(engine.seen.submitted)
    canceled = client.delete(f"/v2/batch/{batch['id']}/cancel")
    assert canceled.status_code == 200
    assert canceled.json()["status"] in ("canceling", "canceled")
    assert canceled.json()["request_counts"]["queued"] == 0
    end = ended(client, batch)
    assert end["status"] == "canceled"
    engine.wait_for(lambda seen: len(seen.aborted) >= 1, "what ran is aborted")
    assert len(engine.seen.submitted) <= submitted + 64
    kinds = [line["result"]["type"] for line in results(client, batch)]
    assert kinds == ["succeeded"] + ["canceled"] * 40
    again = client.delete(f"/v2/batch/{batch['id']}/cancel")
    assert (again.status_code, again.json()) == (200, end)
    assert client.get("/v2/usage").json()["total"]["requests"] == 2


def test_a_batch_expires(client: httpx.Client, engine: ScriptedEngine) -> None:
    """After 24 hours what has not finished is expired, at the engine too; what has finished keeps its results."""
    engine.pause()
    batch = create(client, body("COUNT 0"), *([body("COUNT 4")] * 30))
    until(lambda: show(client, batch)["request_counts"]["succeeded"] == 1, "the first has finished")
    with write(shim_of(client).store.database) as connection:
        connection.execute(update(batches).values(expires_at=now_ms()))
    end = ended(client, batch)
    assert end["status"] == "expired"
    assert [line["result"]["type"] for line in results(client, batch)] == ["succeeded"] + ["expired"] * 30
    engine.wait_for(lambda seen: len(seen.aborted) >= 1, "what ran is aborted")


def test_each_end_is_told_once(make_shim: Shim, engine: ScriptedEngine) -> None:
    """Whichever it is, with the batch as it ended, signed."""

    def calling(config: Config) -> Config:
        return replace(config, webhooks=replace(config.webhooks, allow=("127.0.0.1",)))

    shim = make_shim(engine, configure=calling)
    with receiving() as receiver, shim.client() as client:
        done = ended(client, create(client, body(), webhook_url=receiver.url))
        engine.hold_starts(True)
        canceled = create(client, body(), webhook_url=receiver.url)
        client.delete(f"/v2/batch/{canceled['id']}/cancel").raise_for_status()
        canceled = ended(client, canceled)
        expired = create(client, body(), webhook_url=receiver.url)
        with write(shim.store.database) as connection:
            connection.execute(update(batches).where(batches.c.id == expired["id"]).values(expires_at=now_ms()))
        expired = ended(client, expired)
        heard = receiver.wait(3)
        rows = WebhookRows(shim.store.database, shim.services.secrets)
        until(lambda: {each.state for each in rows.deliveries()} == {"delivered"}, "all are noted")
    events = [Webhook(rows.secret("acme")).verify(each.body, each.headers) for each in heard]
    assert sorted((event["type"], event["data"]["id"]) for event in events) == [
        ("batch.canceled", canceled["id"]),
        ("batch.completed", done["id"]),
        ("batch.expired", expired["id"]),
    ]
    for event in events:
        assert event["data"] in (done, canceled, expired)
        assert event["timestamp"] == event["data"]["ended_at"]
    assert len({each.headers["webhook-id"] for each in heard}) == 3


@pytest.mark.parametrize("gone", ["workspace", "key"])
def test_nothing_more_begins_for_one_who_is_gone(client: httpx.Client, engine: ScriptedEngine, gone: str) -> None:
    """What runs finishes, and is billed; the rest is canceled."""
    shim = shim_of(client)
    other = shim.store.create_key("acme").key
    engine.hold_starts(True)
    batch = create(client, *([body("COUNT 1")] * 80))
    until(lambda: show(client, batch)["request_counts"]["processing"] == FIRST_WINDOW, "some are at the engine")
    if gone == "workspace":
        shim.store.delete_workspace("acme")
    else:
        shim.store.revoke_key(shim.key.key_id)

    def row() -> Any:
        with read(shim.store.database) as connection:
            return connection.execute(select(batches)).mappings().one()

    until(lambda: row()["num_canceled"] == 80 - FIRST_WINDOW, "the rest is canceled")
    assert row()["ended_at"] is None
    engine.hold_starts(False)
    until(lambda: row()["ended_at"] is not None, "what ran has finished")
    found = row()
    assert found["num_succeeded"] == FIRST_WINDOW
    with read(shim.store.database) as connection:
        assert len(connection.execute(select(usage)).all()) == FIRST_WINDOW
    if gone == "key":
        with shim.client(other) as client:
            assert show(client, batch)["status"] == "canceled"


def test_what_is_kept_and_for_how_long(client: httpx.Client) -> None:
    """Bodies go when a batch has ended, results after their retention; both also when the operator deletes it."""
    store = shim_of(client).store
    old, new, deleted = (ended(client, create(client, body(), body())) for _ in range(3))

    def left(table: Any) -> set[str]:
        with read(store.database) as connection:
            return set(connection.execute(select(table.c.batch_id)).scalars())

    batch_sweep.forget(store.database, timedelta(days=29))
    assert left(batch_bodies) == set()
    assert left(batch_items) == {old["id"], new["id"], deleted["id"]}
    with write(store.database) as connection:
        month_ago = now_ms() - 30 * 86_400_000
        connection.execute(update(batches).where(batches.c.id == old["id"]).values(ended_at=month_ago))
    shim_of(client).services.batch_rows.delete(deleted["id"])
    assert client.get(f"/v2/batch/{deleted['id']}").status_code == 404
    batch_sweep.forget(store.database, timedelta(days=29))
    assert left(batch_items) == {new["id"]}
    assert client.get(f"/v2/batch/{old['id']}").status_code == 404
    assert [batch["id"] for batch in client.get("/v2/batch").json()["data"]] == [new["id"]]
    assert client.get("/v2/usage").json()["total"]["requests"] == 6  # what was used stays


# ---------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("code", [pb.ERROR_QUEUE_FULL, pb.ERROR_TENANT_QUEUE_FULL, pb.ERROR_NOT_FOUND])
def test_passing_refusals_are_waited_out(client: httpx.Client, engine: ScriptedEngine, code: pb.ErrorCode) -> None:
    engine.refuse = pb.ErrorDetail(code=code, message="not now")
    batch = create(client, *([body("COUNT 2")] * 6))
    engine.wait_for(lambda seen: len(seen.submitted) >= 6, "it is tried, and tried again")
    assert show(client, batch)["request_counts"]["errored"] == 0
    engine.refuse = None
    assert ended(client, batch)["request_counts"]["succeeded"] == 6


def test_an_engine_that_goes_is_waited_for(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.pause()
    batch = create(client, *([body("COUNT 3")] * 3))
    until(lambda: show(client, batch)["request_counts"]["processing"] == 3, "all run")
    engine.permit(2)
    engine.kill()
    engine.start()
    engine.free_run()
    engine.permit(20)
    end = ended(client, batch)
    assert end["request_counts"]["succeeded"] == 3
    assert {line["result"]["message"]["content"][0]["text"] for line in results(client, batch)} == {"0 1 2 "}


def test_what_the_engine_fails_at_is_tried_a_few_times(client: httpx.Client, engine: ScriptedEngine) -> None:
    engine.fail_after = (1, pb.ErrorDetail(code=pb.ERROR_INTERNAL, message="broken inside"))
    end = ended(client, create(client, body("COUNT 3", custom_id="poison")))
    assert end["request_counts"]["errored"] == 1
    (line,) = results(client, end)
    assert line["result"]["error"]["type"] == "api_error"
    assert "broken inside" not in json.dumps(line)
    assert len(engine.seen.submitted) == 3
    assert client.get("/v2/usage").json()["total"]["requests"] == 0


def test_a_spent_quota_is_waited_for(client: httpx.Client) -> None:
    """Requests wait while the day's tokens are used up, and go on when there are more."""
    shim = shim_of(client)
    shim.store.create_workspace("poor", "pro", tokens_per_day=20)
    with shim.client(shim.store.create_key("poor").key) as poor:
        batch = create(poor, *([body("COUNT 4")] * 8))
        until(lambda: show(poor, batch)["request_counts"]["succeeded"] >= 2, "the quota is used")
        used = poor.get("/v2/usage").json()["total"]
        assert used["input_tokens"] + used["output_tokens"] <= 20 + 10  # by one request at most
        assert show(poor, batch)["ended_at"] is None
        shim.store.update_workspace("poor", tokens_per_day=1_000_000)
        assert ended(poor, batch)["request_counts"]["succeeded"] == 8


def test_a_locked_store_is_waited_for(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """Another program holds its lock for longer than anybody waits: nothing is lost or errs, each is billed once."""
    shim = shim_of(client)
    shim.store.create_workspace("limited", "pro")
    with shim.client(shim.store.create_key("limited").key) as limited:
        batch = create(limited, *([body("COUNT 2")] * 300))
        until(lambda: show(limited, batch)["request_counts"]["succeeded"] >= 1, "it has begun")
        with write(shim.store.database):
            until(lambda: "database is locked" in caplog.text, "somebody has given up waiting")
        assert ended(limited, batch)["request_counts"]["succeeded"] == 300
        total = limited.get("/v2/usage").json()["total"]
        assert (total["requests"], total["output_tokens"]) == (300, 600)


# ---------------------------------------------------------------------------------------------- several processes


def test_two_shims_share_the_work_and_do_none_of_it_twice(make_shim: Shim, make_engine: Engine, store_url: str) -> None:
    def on_store(config: Config) -> Config:
        config.state.mkdir(exist_ok=True)  # as the command line does
        return replace(config, store=replace(config.store, url=store_url))

    engine = make_engine()
    first, second = make_shim(engine, configure=on_store), make_shim(engine, configure=on_store)
    with first.client() as client, second.client() as other:
        batch = create(client, *(body(f"COUNT {1 + n % 4}", custom_id=f"c{n}") for n in range(400)))
        end = ended(other, batch)
        assert end["request_counts"]["succeeded"] == 400
        assert len(engine.seen.submitted) == 400
        lines = results(other, batch)
        assert [line["custom_id"] for line in lines] == [f"c{n}" for n in range(400)]
        total = client.get("/v2/usage").json()["total"]
        assert total["requests"] == 400
        assert total["output_tokens"] == sum(1 + n % 4 for n in range(400))


def test_a_shim_that_ends_gives_back_what_it_holds(make_shim: Shim, make_engine: Engine) -> None:
    """Its requests are queued again at once, and another shim answers them."""
    engine = make_engine()
    first = make_shim(engine)
    engine.pause()
    with first.client() as client:
        batch = create(client, *([body("COUNT 1")] * 20))
        until(lambda: show(client, batch)["request_counts"]["processing"] >= 4, "some run")
    second = make_shim(engine)
    for each in first.servers:
        each.should_exit = True
    first._thread.join(60)
    engine.free_run()
    engine.permit(100)
    with second.client() as client:
        assert ended(client, batch)["request_counts"]["succeeded"] == 20


def test_the_command_line_reaches_running_shims(
    client: httpx.Client, engine: ScriptedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def cli(*words: str, status: int = 0) -> Any:
        assert main([*words, "--state", str(tmp_path / "state"), "--json"]) == status
        said = capsys.readouterr()
        return json.loads(said.out) if status == 0 else said.err

    engine.pause()
    batch = create(client, *([body("COUNT 2")] * 3))
    until(lambda: show(client, batch)["request_counts"]["processing"] == 3, "all run")
    (listed,) = cli("batches", "list")
    assert (listed["id"], listed["workspace"], listed["request_counts"]["total"]) == (batch["id"], "acme", 3)
    assert cli("batches", "list", "--workspace", "acme") == cli("batches", "list")
    assert "nobody" in cli("batches", "list", "--workspace", "nobody", status=1)
    shown = cli("batches", "show", batch["id"])
    assert {name: value for name, value in shown.items() if name != "workspace"} == show(client, batch)
    assert cli("batches", "cancel", batch["id"])["status"] == "canceling"
    assert ended(client, batch)["status"] == "canceled"
    engine.wait_for(lambda seen: len(seen.aborted) == 3, "what ran is aborted")
    assert cli("batches", "delete", batch["id"]) == {"id": batch["id"], "deleted": True}
    assert client.get(f"/v2/batch/{batch['id']}").status_code == 404
    assert batch["id"] in cli("batches", "show", batch["id"], status=1)
    assert cli("webhooks", "list", "--dead") == []
    secret = cli("webhooks", "secret", "--workspace", "acme")
    assert cli("webhooks", "secret", "--workspace", "acme") == secret
    assert cli("webhooks", "secret", "--workspace", "acme", "--rotate") != secret
    assert "evt_1" in cli("webhooks", "redeliver", "evt_1", status=1)
    assert cli("batches", "list") == []
