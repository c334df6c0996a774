"""`GET /v2/usage` and the command line: to the token what replies reported, whatever became of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy import text as sql
from support.scripted_engine import ScriptedEngine
from support.shim_process import ShimProcess
from support.shim_server import HAIKU, SONNET, ShimServer, until

from aiexport_edge.shim.cli.main import main
from aiexport_edge.shim.prices import Price, dollars
from aiexport_edge.shim.store import Store, UsageRow, days, open_store, quotas, usage_rows
from aiexport_edge.shim.store.database import write
from aiexport_edge.shim.store.quotas import Claim
from aiexport_edge.shim.store.schema import usage, usage_days
from aiexport_edge.shim.store.usage_rows import UsageRows, record
from aiexport_edge.shim.store.usage_sums import sums

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
PRICES = {HAIKU: (Decimal("0.25"), Decimal("1.25")), SONNET: (Decimal(3), Decimal(15))}
FIELDS = ("requests", "input_tokens", "cache_read_input_tokens", "output_tokens")
TODAY = datetime(2025, 4, 10, 12, tzinfo=UTC)


def message(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": text}], **fields}


def get(client: httpx.Client, **query: str) -> Any:
    reply = client.get("/v2/usage", params=query)
    assert reply.status_code == 200, reply.text
    return json.loads(reply.text, parse_float=Decimal)


# ---------------------------------------------------------------------------------------------- the document


def test_the_document(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    engine.cached_tokens = 2
    shim = make_shim(engine)
    other = shim.store.create_key("acme")
    with shim.client() as client:
        nothing = get(client)
        zero = dict.fromkeys(FIELDS, 0) | {"cost_usd": 0}
        today = datetime.now(UTC).date()
        assert nothing == {"start": str(today - timedelta(days=29)), "end": str(today), "total": zero}
        assert get(client, group_by="model")["data"] == []
        client.post("/v2/messages", json=message("COUNT 5"))
        alias = SONNET.rpartition("-")[0]  # counts as the id that it stands for
        client.post("/v2/messages/stream", json=message("COUNT 7", model=alias))
        client.post("/v2/messages", json=message("COUNT 1"), headers={"X-API-Key": other.key})
        by_model = get(client, group_by="model")
        assert by_model["data"] == [
            dict(zip(("group", *FIELDS), (HAIKU, 2, 8, 4, 6), strict=True)) | {"cost_usd": Decimal("0.0000105")},
            dict(zip(("group", *FIELDS), (SONNET, 1, 4, 2, 7), strict=True)) | {"cost_usd": Decimal("0.000123")},
        ]
        total = by_model["total"]
        assert total == dict(zip(FIELDS, (3, 12, 6, 13), strict=True)) | {"cost_usd": Decimal("0.0001335")}
        by_key = get(client, group_by="key")
        assert {row["group"]: row["requests"] for row in by_key["data"]} == {shim.key.key_id: 2, other.key_id: 1}
        by_day = get(client, group_by="day", start=str(today), end=str(today))
        assert by_day["data"] == [{"group": str(today), **total}]
        assert get(client, start="1970-01-01", end=str(today - timedelta(days=1)))["total"] == zero
        assert get(client)["total"] == by_key["total"] == by_day["total"] == total


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"start": "yesterday"}, "start"),
        ({"start": "2025-02-30"}, "start"),
        ({"end": "2025-04-01T00:00:00Z"}, "end"),
        ({"end": "20250401"}, "end"),
        ({"start": "2025-04-02", "end": "2025-04-01"}, "start"),
        ({"start": "9999-12-31"}, "start"),
        ({"group_by": "workspace"}, "group_by"),
        ({"group_by": ""}, "group_by"),
    ],
)
def test_bad_queries(shim: ShimServer, query: dict[str, str], param: str) -> None:
    with shim.client() as client:
        reply = client.get("/v2/usage", params=query)
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert reply.json()["error"]["param"] == param
    assert reply.json()["error"]["message"].startswith(f"{param}: ")


def test_dates_that_reach_far(shim: ShimServer) -> None:
    with shim.client() as client:
        assert get(client, start="0001-01-01", end="9999-12-31")["end"] == "9999-12-31"
        reply = client.get("/v2/usage", params={"end": "0001-01-02"})
    assert reply.status_code == 200
    assert reply.json()["start"] == "0001-01-01"


def test_it_needs_the_scope_and_is_the_workspaces_own(make_engine: Engines, make_shim: Shims) -> None:
    shim = make_shim(make_engine())
    shim.store.create_workspace("rival", "pro")
    rival = shim.store.create_key("rival")
    with shim.client() as client:
        client.post("/v2/messages", json=message("COUNT 5"))
        assert get(client)["total"]["requests"] == 1
        narrow = shim.store.create_key("acme", scopes=["messages"])
        assert client.get("/v2/usage", headers={"X-API-Key": narrow.key}).status_code == 403
    with shim.client(rival.key) as client:
        assert get(client, group_by="model") == get(client, group_by="model") | {"data": []}
        assert get(client)["total"]["requests"] == 0


# ---------------------------------------------------------------------------------------------- what replies reported


@dataclass
class Reported:
    """What the clients were told, by model."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: {HAIKU: Counter(), SONNET: Counter()})
    left: dict[str, int] = field(default_factory=dict)  # streams that were left, and what they can have got at most

    def add(self, model: str, used: dict[str, int]) -> None:
        self.counts[model].update(used)
        self.counts[model]["requests"] += 1

    def cost(self, model: str) -> Decimal:
        counts, (read, written) = self.counts[model], PRICES[model]
        tokens = counts["input_tokens"] + counts["cache_read_input_tokens"]
        return (tokens * read + counts["output_tokens"] * written) / 1_000_000


async def _one(client: httpx.AsyncClient, random_: random.Random, reported: Reported) -> None:
    """A request of a random kind."""
    model, count = random_.choice((HAIKU, SONNET)), random_.randrange(1, 40)
    body = message(f"COUNT {count}", model=model, max_tokens=random_.randrange(1, 50))
    kind = random_.choice(("unary", "stream", "leave", "bad"))
    if kind == "bad":
        assert (await client.post("/v2/messages", json=body | {"max_tokens": 0})).status_code == 400
        return
    if kind == "unary":
        reply = await client.post("/v2/messages", json=body)
        assert reply.status_code == 200
        reported.add(model, reply.json()["usage"])
        return
    used: dict[str, int] = {}
    async with client.stream("POST", "/v2/messages/stream", json=body) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["type"] == "message_start":
                used = event["message"]["usage"]
                if kind == "leave":
                    reported.left[response.headers["request-id"]] = min(count, body["max_tokens"])
                    break
            elif event["type"] == "message_delta":
                used["output_tokens"] = event["usage"]["output_tokens"]
    if kind == "stream":
        reported.add(model, used)


def rows_of(store: Store, condition: Any) -> list[dict[str, Any]]:
    with store.database.connect() as connection:
        return [dict(row) for row in connection.execute(select(usage).where(condition)).mappings()]


def test_random_traffic_adds_up(make_engine: Engines, make_shim: Shims) -> None:
    """Whole replies, streams, streams that are left, requests that are refused: by model and in all."""
    engine = make_engine()
    engine.cached_tokens = 3
    shim = make_shim(engine)
    reported = Reported()
    random_ = random.Random(7)

    async def run() -> None:
        headers = {"X-API-Key": shim.key.key}
        async with httpx.AsyncClient(base_url=shim.base_url, headers=headers, timeout=60) as client:
            for _ in range(6):
                await asyncio.gather(*(_one(client, random_, reported) for _ in range(20)))

    asyncio.run(run())
    _running_end(shim.store)
    left = rows_of(shim.store, usage.c.request_id.in_(reported.left))
    assert len(left) == len(reported.left) > 0
    for row in left:  # what became of them, only the shim knows
        assert (row["input_tokens"], row["cache_read_input_tokens"]) == (3, 3)
        assert 0 <= row["output_tokens"] <= reported.left[row["request_id"]]
        reported.add(row["model"], {name: row[name] for name in FIELDS[1:]})
    with shim.client() as client:
        found = {row["group"]: row for row in get(client, group_by="model")["data"]}
    for model, counts in reported.counts.items():
        assert {name: found[model][name] for name in FIELDS} == {name: counts[name] for name in FIELDS}
        assert found[model]["cost_usd"] == reported.cost(model)


def _running_end(store: Store) -> None:
    def none_runs() -> bool:
        with store.database.connect() as connection:
            return connection.execute(sql("SELECT count(*) FROM usage WHERE status = 'running'")).scalar() == 0

    until(none_runs, "nothing runs any more", 60)


def test_a_killed_shim_loses_and_doubles_nothing(make_engine: Engines, tmp_path: Path) -> None:
    """Replies that were complete count as reported; those it died with, as checkpointed; the sums are the rows'."""
    engine = make_engine()
    state, url = tmp_path / "state", f"sqlite:///{tmp_path}/state/store.db"
    config = tmp_path / "config.toml"
    config.write_text("")
    store = open_store(url)
    store.create_workspace("acme", "enterprise")
    key = store.create_key("acme").key
    doomed = ShimProcess(state, config, engine.address, "doomed")
    heir = ShimProcess(state, config, engine.address, "heir")
    try:
        for process in (doomed, heir):
            process.wait_ready()
        reported = Reported()
        random_ = random.Random(11)

        async def run() -> None:
            headers = {"X-API-Key": key}
            async with httpx.AsyncClient(base_url=doomed.base_url, headers=headers, timeout=60) as client:
                complete = [
                    client.post("/v2/messages", json=message(f"COUNT {random_.randrange(30)}")) for _ in range(20)
                ]
                for reply in await asyncio.gather(*complete):
                    reported.add(HAIKU, reply.json()["usage"])
                engine.pause()
                engine.permit(15)
                streams = [
                    client.send(
                        client.build_request("POST", "/v2/messages/stream", json=message("COUNT 30")), stream=True
                    )
                    for _ in range(5)
                ]
                replies = await asyncio.gather(*streams)
                until(lambda: _checkpointed(store) == 15, "fifteen tokens are written")
                doomed.kill()
                for reply in replies:
                    with pytest.raises(httpx.HTTPError):
                        await reply.aread()

        asyncio.run(run())
        with store.database.begin() as connection:  # rather than wait for the silence to pass
            connection.execute(sql("UPDATE processes SET heartbeat_at = heartbeat_at - 60000"))
        _running_end(store)
        engine.free_run()
        left = rows_of(store, usage.c.status == "aborted")
        assert sum(row["output_tokens"] for row in left) == 15
        for row in left:
            reported.add(HAIKU, {name: row[name] for name in FIELDS[1:]})
        with httpx.Client(base_url=heir.base_url, headers={"X-API-Key": key}, timeout=60) as client:
            total = get(client)["total"]
        assert {name: total[name] for name in FIELDS} == {name: reported.counts[HAIKU][name] for name in FIELDS}
        assert total["requests"] == 25
        assert total["cost_usd"] == reported.cost(HAIKU)
    finally:
        doomed.close()
        heir.close()
        store.close()


def _checkpointed(store: Store) -> int:
    with store.database.connect() as connection:
        return int(
            connection.execute(sql("SELECT sum(output_tokens) FROM usage WHERE status = 'running'")).scalar() or 0
        )


# ---------------------------------------------------------------------------------------------- the sums


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = open_store(store_url)
    opened.create_workspace("acme", "pro")
    yield opened
    opened.close()


def row(store: Store, request_id: str, *, status: str = "completed", **values: Any) -> UsageRow:
    made: dict[str, Any] = {
        "request_id": request_id,
        "message_id": "msg_1",
        "workspace_id": store.get_workspace("acme").id,
        "key_id": "key_1",
        "model": "m",
        "status": status,
        "input_tokens": 10,
        "cache_read_input_tokens": 1,
        "output_tokens": 5,
        "created_at": TODAY,
        "ended_at": None if status == "running" else TODAY,
        "cost": 7,
    }
    return UsageRow(**made | values)


def total(store: Store) -> tuple[int, ...]:
    day = days.day_of(TODAY)
    found = sums(store.database, day - 1000, day + 1000)[0]
    return (found.requests, found.input_tokens, found.cache_read_input_tokens, found.output_tokens, found.cost)


def test_a_row_counts_once_however_often_it_is_settled(store: Store) -> None:
    """By its process, by another that thinks it dead, by a commit whose answer was lost: by what it is at last."""
    rows = UsageRows(store.database, "proc_1")
    rows.save([row(store, "req_1", status="running"), row(store, "req_2", status="running")], [])
    assert total(store) == (0, 0, 0, 0, 0)
    for _ in range(2):
        rows.save([], [row(store, "req_1")])
        assert total(store) == (1, 10, 1, 5, 7)
    rows.leave()
    assert total(store) == (2, 20, 2, 10, 14)
    rows.save([], [row(store, "req_2", output_tokens=9, cost=11)])
    assert total(store) == (2, 20, 2, 14, 18)
    rows.save([], [row(store, "req_2", status="running")])  # a checkpoint that comes late
    assert total(store) == (2, 20, 2, 14, 18)
    rows.save([], [row(store, "req_never_admitted")])
    assert total(store) == (2, 20, 2, 14, 18)


def test_a_batchs_row_is_recorded_once(store: Store) -> None:
    claim = Claim("req_1", store.get_workspace("acme").id, 50, 100, days.day_of(TODAY))
    rows = UsageRows(store.database, "proc_1")
    rows.save([], [], [claim])
    for _ in range(2):
        with write(store.database) as connection:
            record(connection, [row(store, "req_1", batch=True), row(store, "req_2")], "proc_1")
        assert total(store) == (2, 20, 2, 10, 14)
    standing = quotas.read_standing(store.database, claim.workspace_id, claim.day)
    assert (standing.used, standing.reserved) == (32, 0)
    with store.database.connect() as connection:
        kinds = connection.execute(select(usage_days.c.batch, usage_days.c.requests)).all()
    assert sorted(kinds) == [(False, 1), (True, 1)]


def test_an_attempt_after_a_dead_one_takes_its_reservation_over(store: Store) -> None:
    claim = Claim("req_1", store.get_workspace("acme").id, 50, 1000, days.day_of(TODAY))
    first, second = (UsageRows(store.database, f"proc_{name}") for name in ("first", "second"))
    for rows in (first, second):
        assert not rows.save([], [], [claim]).refused
    first.leave()
    assert quotas.read_standing(store.database, claim.workspace_id, claim.day).reserved == 50
    second.leave()
    assert quotas.read_standing(store.database, claim.workspace_id, claim.day).reserved == 0


def test_what_has_no_process_is_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was thought dead has lost its heartbeat's row, and then really dies before the next."""
    monkeypatch.setattr(usage_rows, "DOUBT", timedelta(0))
    claim = Claim("req_1", store.get_workspace("acme").id, 50, 1000, days.day_of(TODAY))
    lost, other = (UsageRows(store.database, f"proc_{name}") for name in ("lost", "other"))
    lost.save([row(store, "req_1", status="running")], [], [claim])
    with store.database.begin() as connection:
        connection.execute(sql("DELETE FROM processes"))
    other.save([], [])
    assert other.settle_dead(timedelta(seconds=15)) == 1
    assert total(store) == (1, 10, 1, 5, 7)
    assert quotas.read_standing(store.database, claim.workspace_id, claim.day).reserved == 0


def test_what_was_never_replied_is_no_request(store: Store) -> None:
    nothing: dict[str, Any] = {"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0, "cost": 0}
    rows = UsageRows(store.database, "proc_1")
    rows.save([row(store, f"req_{i}", status="running") for i in range(3)], [])
    rows.save([], [row(store, "req_0", status="failed", **nothing), row(store, "req_1", status="aborted", **nothing)])
    assert total(store)[0] == 0
    rows.save([], [row(store, "req_2", **nothing)])
    assert total(store)[0] == 1


def test_single_rows_go_and_their_sums_stay(store: Store) -> None:
    rows = UsageRows(store.database, "proc_1")
    old = datetime.now(UTC) - timedelta(days=30)
    made = [row(store, f"req_{i}", status="running", created_at=old) for i in range(3)]
    made.append(row(store, "req_new", status="running", created_at=datetime.now(UTC)))
    rows.save(made, [])
    rows.save([], [row(store, "req_0", created_at=old), row(store, "req_1", created_at=old)])
    day = days.day_of(old)
    before = sums(store.database, day, day)
    assert [rows.forget(timedelta(days=29), 1) for _ in range(3)] == [1, 1, 0]
    assert sums(store.database, day, day) == before
    assert before[0].requests == 2
    with store.database.connect() as connection:
        left = connection.execute(select(usage.c.request_id).order_by(usage.c.request_id)).scalars().all()
    assert left == ["req_2", "req_new"]  # what runs stays


def test_sums_of_any_size_are_exact(store: Store) -> None:
    """A cost beyond 64 bits in all: SQLite would refuse to add it up."""
    rows = UsageRows(store.database, "proc_1")
    high = 9 * 10**18 + 1
    for day in range(3):
        moment = TODAY + timedelta(days=day)
        rows.save([row(store, f"req_{day}", status="running", created_at=moment)], [])
        rows.save([], [row(store, f"req_{day}", created_at=moment, cost=high)])
    assert total(store)[4] == 3 * high


@given(
    per_million=st.decimals(0, 1000, places=5),
    calls=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**5), st.booleans()), max_size=50),
)
@settings(deadline=None)
def test_prices_do_not_drift(per_million: Decimal, calls: list[tuple[int, int, bool]]) -> None:
    units, exact = 0, Decimal(0)
    for read, written, batch in calls:
        price = Price.per_million(float(per_million), 2 * float(per_million), batch=batch)
        units += read * price.input + written * price.output
        exact += (read + 2 * written) * per_million / 1_000_000 / (2 if batch else 1)
    assert dollars(units) == exact


def test_dollars_are_plain_numbers() -> None:
    for units, text in ((0, "0"), (10**12, "1"), (250_000, "2.5E-7"), (15 * 10**12, "15"), (1_500_000_000_000, "1.5")):
        assert str(dollars(units)) == text


# ---------------------------------------------------------------------------------------------- the command line


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    store = open_store(f"sqlite:///{state}/store.db")
    for name in ("acme", "rival"):
        store.create_workspace(name, "pro")
    rival = store.get_workspace("rival").id
    rows = UsageRows(store.database, "proc_1")
    made = [row(store, "req_1"), row(store, "req_2", workspace_id=rival, model="n", cost=10**12)]
    rows.save(
        [row(store, one.request_id, status="running", workspace_id=one.workspace_id, model=one.model) for one in made],
        [],
    )
    rows.save([], made)
    store.close()

    def run(*words: str, status: int = 0) -> str:
        assert main(["usage", "--state", str(state), *words]) == status
        said = capsys.readouterr()
        return said.err if status else said.out

    def document(*words: str) -> Any:
        return json.loads(run(*words, "--json"), parse_float=Decimal)

    span = ("--start", "2025-04-01", "--end", "2025-04-10")
    found = document(*span, "--by", "model")
    assert [line["group"] for line in found["data"]] == ["m", "n"]
    assert found["total"]["cost_usd"] == Decimal("1.000000000007")
    assert document(*span, "--workspace", "acme")["total"]["requests"] == 1
    assert "data" not in document(*span)
    assert document("--end", "2025-04-09")["total"]["requests"] == 0
    assert document("--end", "2025-04-10", "--by", "day")["data"][0]["group"] == "2025-04-10"
    table = run(*span, "--by", "key").splitlines()
    assert table[0] == "2025-04-01 to 2025-04-10, in UTC"
    assert table[1].split() == ["GROUP", *(name.upper() for name in (*FIELDS, "cost_usd"))]
    assert table[2].split() == ["key_1", "2", "20", "2", "10", "1.000000000007"]
    assert table[3].split()[0] == "total"
    assert "no workspace named nope" in run("--workspace", "nope", status=1)
    assert "--start must not be after the end" in run("--start", "2999-01-01", status=1)
    assert date.fromisoformat(document()["end"]) - date.fromisoformat(document()["start"]) == timedelta(days=29)
