"""Usage rows: reserved before the 200, settled at the end, whatever the end is; nothing is lost with a process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text as sql
from sqlalchemy.exc import OperationalError
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import usage
from aiexport_edge.shim.prices import Price
from aiexport_edge.shim.store import Store, UsageRow, open_store, usage_rows
from aiexport_edge.shim.store.quotas import Decision
from aiexport_edge.shim.store.usage_rows import UsageRows
from aiexport_edge.shim.usage import Entry, UsageLedger

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
YEAR = timedelta(days=365)


def rows(store: Store) -> list[dict[str, Any]]:
    with store.database.connect() as connection:
        return [dict(row) for row in connection.execute(sql("SELECT * FROM usage ORDER BY created_at")).mappings()]


def counts(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("status", "input_tokens", "cache_read_input_tokens", "output_tokens"))


def message(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": text}], **fields}


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = open_store(store_url)
    opened.create_workspace("acme", "pro")
    yield opened
    opened.close()


def entry(store: Store, name: str = "req_1") -> Entry:
    return Entry(name, "msg_1", store.get_workspace("acme").id, "key_1", "m", 10, Price(2, 10))


def test_one_row_a_request(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    engine.cached_tokens = 2
    shim = make_shim(engine)
    with shim.client() as client:
        first = client.post("/v2/messages", json=message("COUNT 5"))
        second = client.post("/v2/messages/stream", json=message("COUNT 7"))
        for bad in (message("x", max_tokens=0), message("word " * 5000)):
            assert client.post("/v2/messages", json=bad).status_code == 400
        engine.refuse = pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL)
        assert client.post("/v2/messages", json=message("x")).status_code == 503
    until(lambda: [row["status"] for row in rows(shim.store)] == ["completed"] * 2, "both are settled")
    found = rows(shim.store)
    assert [counts(row)[1:] for row in found] == [(4, 2, 5), (4, 2, 7)]
    assert found[0]["request_id"] == first.headers["request-id"]
    assert found[0]["message_id"] == first.json()["id"]
    assert found[1]["request_id"] == second.headers["request-id"]
    for row in found:
        assert (row["key_id"], row["workspace_id"]) == (shim.key.key_id, shim.store.get_workspace("acme").id)
        assert row["model"] == HAIKU
        assert row["created_at"] <= row["first_token_at"] <= row["ended_at"]


def test_the_row_is_there_before_the_first_byte(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.hold_starts(True)
    with shim.client() as client, client.stream("POST", "/v2/messages/stream", json=message("COUNT 5")) as reply:
        assert [counts(row) for row in rows(shim.store)] == [("running", 6, 0, 0)]
        engine.hold_starts(False)
        reply.read()
    until(lambda: rows(shim.store)[0]["status"] == "completed", "it is settled")


def test_progress_is_checkpointed(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    engine.cached_tokens = 1
    shim = make_shim(engine)
    engine.pause()
    engine.permit(4)
    with shim.client() as client, client.stream("POST", "/v2/messages/stream", json=message("COUNT 9")) as reply:
        until(lambda: counts(rows(shim.store)[0]) == ("running", 5, 1, 4), "four tokens are written")
        engine.free_run()
        engine.permit(1)
        reply.read()
    until(lambda: counts(rows(shim.store)[0]) == ("completed", 5, 1, 9), "it is settled")


def test_a_cut_stream_is_billed_for_what_was_sent(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    engine.permit(4)
    with shim.client() as client, client.stream("POST", "/v2/messages/stream", json=message("COUNT 9")) as reply:
        for piece in reply.iter_text():
            if "3 " in piece:
                break
    until(lambda: rows(shim.store)[0]["status"] == "aborted", "it is settled")
    assert counts(rows(shim.store)[0]) == ("aborted", 6, 0, 4)


def test_what_never_ran_costs_nothing(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.hold_starts(True)
    with shim.client() as client, client.stream("POST", "/v2/messages/stream", json=message("COUNT 9")) as reply:
        assert reply.status_code == 200
    until(lambda: rows(shim.store)[0]["status"] == "aborted", "it is settled")
    assert counts(rows(shim.store)[0]) == ("aborted", 0, 0, 0)


def test_failures(make_engine: Engines, make_shim: Shims) -> None:
    """A stream pays for what it got, a whole reply that became a 500 for nothing."""
    engine = make_engine()
    shim = make_shim(engine)
    engine.fail_after = (3, pb.ErrorDetail(code=pb.ERROR_INTERNAL))
    with shim.client() as client:
        client.post("/v2/messages/stream", json=message("COUNT 9"))
        client.post("/v2/messages", json=message("COUNT 9"))
    until(lambda: [row["status"] for row in rows(shim.store)] == ["failed"] * 2, "both are settled")
    assert [counts(row)[1:] for row in rows(shim.store)] == [(6, 0, 3), (0, 0, 0)]


def test_a_store_that_can_not_be_written_refuses(make_engine: Engines, make_shim: Shims, monkeypatch: Any) -> None:
    """No row, no reply: and the engine is not left working."""
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()

    def fail(*_: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("disk is full"))

    with shim.client() as client:
        assert client.get("/v2/models").status_code == 200
        monkeypatch.setattr(UsageRows, "save", fail)
        reply = client.post("/v2/messages/stream", json=message("COUNT 9"))
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "overloaded_error"
        assert int(reply.headers["retry-after"]) > 0
        assert "disk" not in reply.text
        engine.wait_for(lambda seen: len(seen.aborted) == 1, "the abort")
        monkeypatch.undo()
        engine.free_run()
        assert client.post("/v2/messages", json=message("COUNT 9")).status_code == 200


class SlowRows(UsageRows):
    """Counts transactions, and holds the first until told."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.database, "proc_slow")
        self.saves: list[int] = []
        self.go = threading.Event()

    def save(self, reserved: Any, changed: Any, *more: Any) -> Decision:
        if not self.go.is_set() and reserved:
            assert self.go.wait(60)
        saved = super().save(reserved, changed, *more)
        if reserved:
            self.saves.append(len(reserved))
        return saved


def test_reservations_share_a_transaction(store: Store) -> None:
    """What comes in while one is committed goes into the next."""
    slow = SlowRows(store)
    ledger = UsageLedger(slow, YEAR)
    ledger.start()

    async def reserve_all() -> None:
        tasks = [asyncio.create_task(ledger.reserve(entry(store, f"req_{i}"))) for i in range(64)]
        await asyncio.sleep(0)
        slow.go.set()
        await asyncio.gather(*tasks)

    asyncio.run(reserve_all())
    ledger.close()
    assert sum(slow.saves) == 64
    assert len(slow.saves) <= 4


def test_settled_rows_are_written_again_until_they_are(store: Store) -> None:
    class FailingRows(UsageRows):
        failures = 0

        def save(self, reserved: Any, changed: Any, *more: Any) -> Decision:
            if changed and self.failures < 2:
                self.failures += 1
                raise OperationalError("UPDATE", {}, Exception("database is locked"))
            return super().save(reserved, changed, *more)

    failing = FailingRows(store.database, "proc_1")
    ledger = UsageLedger(failing, YEAR)
    ledger.start()
    made = entry(store)
    asyncio.run(ledger.reserve(made))
    made.output_tokens = 5
    ledger.settle(made, "completed")
    until(lambda: counts(rows(store)[0]) == ("completed", 10, 0, 5), "the row is written in the end")
    ledger.close()
    assert failing.failures == 2


def row(store: Store, request_id: str, output_tokens: int) -> UsageRow:
    made = entry(store, request_id)
    made.output_tokens = output_tokens
    return made.row()


def test_rows_of_a_dead_process_are_settled_by_another(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was last checkpointed; a process that is alive keeps its own."""
    monkeypatch.setattr(usage_rows, "DOUBT", timedelta(0))
    dead, alive, other = (UsageRows(store.database, f"proc_{name}") for name in ("dead", "alive", "other"))
    dead.save([row(store, "req_dead", 0)], [row(store, "req_dead", 7)])
    alive.save([row(store, "req_alive", 3)], [])
    with store.database.begin() as connection:
        connection.execute(sql("UPDATE processes SET heartbeat_at = heartbeat_at - 60000 WHERE id = 'proc_dead'"))
    assert other.settle_dead(usage.SILENCE) == 1
    assert other.settle_dead(usage.SILENCE) == 0
    found = {row["request_id"]: counts(row) for row in rows(store)}
    assert found == {"req_dead": ("aborted", 10, 0, 7), "req_alive": ("running", 10, 0, 3)}
    # It was only asleep: it settles its row after all.
    late = entry(store, "req_dead")
    late.output_tokens, late.status = 9, "completed"
    dead.save([], [late.row()])
    assert {r["request_id"]: counts(r) for r in rows(store)}["req_dead"] == ("completed", 10, 0, 9)


def test_a_process_that_ends_leaves_nothing_running(store: Store) -> None:
    ledger = UsageLedger(UsageRows(store.database, "proc_1"), YEAR)
    ledger.start()
    made = entry(store)
    asyncio.run(ledger.reserve(made))
    made.output_tokens = 4
    ledger.close()
    assert counts(rows(store)[0]) == ("aborted", 10, 0, 4)
    with store.database.connect() as connection:
        assert connection.execute(sql("SELECT count(*) FROM processes")).scalar() == 0


def test_silence_is_longer_than_a_checkpoint() -> None:
    assert timedelta(seconds=5 * usage.CHECKPOINT_S) < usage.SILENCE
