"""Batches in the store, in each kind of database: leases, answers that count once, ends, durability."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event, func, insert, select, update

from aiexport_edge.shim.store import Missing, Store, StoreError, open_store
from aiexport_edge.shim.store import batch_sweep as sweep
from aiexport_edge.shim.store.batch_leases import BatchLeases
from aiexport_edge.shim.store.batch_rows import BatchRows
from aiexport_edge.shim.store.batch_values import Answer, Batch, Leased, NewItem
from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.rows import now_ms
from aiexport_edge.shim.store.schema import batch_bodies, batch_items, batches, processes, usage, webhook_deliveries
from aiexport_edge.shim.store.usage_rows import record
from aiexport_edge.shim.store.values import UsageRow


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = open_store(store_url)
    opened.create_workspace("acme", "enterprise")
    yield opened
    opened.close()


def process(database: Engine) -> tuple[str, BatchLeases]:
    """A shim process that lives until its row in `processes` is gone."""
    process_id = new_id("proc_")
    with write(database) as connection:
        connection.execute(insert(processes).values(id=process_id, started_at=now_ms(), heartbeat_at=now_ms()))
    return process_id, BatchLeases(database, process_id, partial(record, process_id=process_id))


def die(database: Engine, process_id: str) -> None:
    with write(database) as connection:
        connection.execute(delete(processes).where(processes.c.id == process_id))


def make(store: Store, count: int, *, workspace: str = "acme", url: str | None = None, model: str = "m") -> Batch:
    items = [NewItem(index, f"c{index}", model, b'{"n":%d}' % index) for index in range(count)]
    workspace_id = store.get_workspace(workspace).id
    return BatchRows(store.database).create(workspace_id, "key_1", items, num_items=count, webhook_url=url)


def answer(leased: Leased, state: str = "succeeded") -> Answer:
    row = UsageRow(
        request_id=leased.request_id,
        message_id="msg_1",
        workspace_id=leased.principal.workspace_id,
        key_id="key_1",
        model=leased.model,
        status="completed",
        input_tokens=3,
        cache_read_input_tokens=0,
        output_tokens=2,
        created_at=datetime.now(UTC),
        ended_at=datetime.now(UTC),
        batch=True,
    )
    good = state == "succeeded"
    return Answer(leased, state, b'{"of":%d}' % leased.index if good else None, row if good else None)


def lease(leases: BatchLeases, batch: Batch, count: int) -> list[Leased]:
    return leases.lease(batch.id, num_items=count, num_bytes=1 << 20)


def test_leased_once_and_answered_once(store: Store) -> None:
    batch = make(store, 10)
    (_, first), (_, second) = process(store.database), process(store.database)
    mine, theirs = lease(first, batch, 4), lease(second, batch, 100)
    assert [each.index for each in mine] == [0, 1, 2, 3]
    assert [each.index for each in theirs] == [4, 5, 6, 7, 8, 9]
    assert mine[2].body == b'{"n":2}'
    assert lease(first, batch, 1) == []
    assert first.waiting() == []
    assert len(first.answer([answer(each) for each in mine])) == 4
    assert first.answer([answer(each) for each in mine]) == []  # said twice
    assert first.answer([answer(each) for each in theirs]) == []  # another's
    assert len(second.answer([answer(each) for each in theirs])) == 6
    rows = BatchRows(store.database)
    found = rows.get(batch.id, None)
    assert (found.status, found.num_succeeded) == ("completed", 10)
    assert [(each.index, each.custom_id, each.body) for each in rows.results(batch.id, 0)] == [
        (index, f"c{index}", b'{"of":%d}' % index) for index in range(10)
    ]


def test_a_dead_processes_requests_are_answered_by_another_and_its_own_answers_come_too_late(store: Store) -> None:
    batch = make(store, 3)
    (asleep_id, asleep), (_, other) = process(store.database), process(store.database)
    held = lease(asleep, batch, 3)
    assert other.requeue_dead() == 0
    die(store.database, asleep_id)
    assert lease(asleep, batch, 1) == []  # it counts as dead, and may take nothing
    assert other.requeue_dead() == 3
    assert other.requeue_dead() == 0
    again = lease(other, batch, 2)
    assert [each.attempt for each in again] == [2, 2]
    assert asleep.answer([answer(held[0]), answer(held[2])]) == []
    assert len(other.answer([answer(again[0]), answer(again[1])])) == 2
    # the sleeper is back, is given the third again, and its first lease of it still does not count
    with write(store.database) as connection:
        connection.execute(insert(processes).values(id=asleep_id, started_at=0, heartbeat_at=now_ms()))
    (third,) = lease(asleep, batch, 1)
    assert asleep.answer([answer(held[2])]) == []
    assert len(asleep.answer([answer(third)])) == 1
    with read(store.database) as connection:
        assert connection.execute(select(func.count()).select_from(usage)).scalar_one() == 3


def test_turns_skip_models_that_are_not_ready_and_large_bodies(store: Store) -> None:
    workspace_id = store.get_workspace("acme").id
    items = [NewItem(i, None, "ab"[i % 2], b"x" * 100) for i in range(6)]
    batch = BatchRows(store.database).create(workspace_id, "key_1", items, num_items=6, webhook_url=None)
    _, leases = process(store.database)
    assert [each.index for each in leases.lease(batch.id, num_items=9, num_bytes=250, without_models=["a"])] == [1, 3]
    assert [each.index for each in leases.lease(batch.id, num_items=9, num_bytes=1, without_models=["a"])] == [5]
    assert [each.index for each in leases.lease(batch.id, num_items=2, num_bytes=1000)] == [0, 2]


def test_half_a_batch_is_never_seen(store: Store) -> None:
    """Neither one whose process dies on the way nor one that is not written whole; both are swept up."""

    def items() -> Iterator[NewItem]:
        yield from (NewItem(index, None, "m", b"x" * 100_000) for index in range(60))
        raise OSError("the process dies")

    rows, workspace_id = BatchRows(store.database), store.get_workspace("acme").id
    with pytest.raises(OSError, match="dies"):
        rows.create(workspace_id, "key_1", items(), num_items=61, webhook_url=None)
    with pytest.raises(StoreError, match="not written whole"):
        rows.create(workspace_id, "key_1", [NewItem(0, None, "m", b"")], num_items=2, webhook_url=None)
    _, leases = process(store.database)
    assert rows.page(None, limit=100) == ([], False)
    assert leases.waiting() == []
    sweep.stop(store.database)
    sweep.forget(store.database, timedelta(days=29))
    with write(store.database) as connection:
        assert connection.execute(select(func.count()).select_from(batches)).scalar_one() == 2  # it may still come
        connection.execute(update(batches).values(created_at=0))
    sweep.forget(store.database, timedelta(days=29))
    with read(store.database) as connection:
        for table in (batches, batch_items, batch_bodies):
            assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 0


def test_accepted_is_synced_and_results_need_not_be(store: Store) -> None:
    if store.database.dialect.name != "sqlite":
        pytest.skip("PostgreSQL syncs every commit unless its operator says otherwise")
    said: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("PRAGMA synchronous"):
            said.append(statement.rpartition(" ")[2])

    event.listen(store.database, "before_cursor_execute", note)
    batch = make(store, 3)
    assert said[-1] == "FULL"  # the last transaction, and with it the log before
    _, leases = process(store.database)
    said.clear()
    leases.answer([answer(each) for each in lease(leases, batch, 3)])
    assert said == ["NORMAL", "NORMAL", "FULL"]  # lease, answers; the end, whose webhook may go out at once


def test_two_processes_end_a_batch_once(store: Store) -> None:
    """Both answer the rest at the same time: one of them ends the batch, with one delivery."""
    for _ in range(5):
        batch = make(store, 8, url="http://hooks.example.com/")
        workers = [process(store.database)[1] for _ in range(4)]
        held = [lease(worker, batch, 2) for worker in workers]
        start = threading.Barrier(4)

        def finish(worker: BatchLeases, mine: list[Leased], start: threading.Barrier = start) -> None:
            start.wait()
            worker.answer([answer(each) for each in mine])

        threads = [threading.Thread(target=finish, args=pair) for pair in zip(workers, held, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert BatchRows(store.database).get(batch.id, None).status == "completed"
        with read(store.database) as connection:
            query = select(webhook_deliveries.c.type).where(webhook_deliveries.c.batch_id == batch.id)
            assert connection.execute(query).scalars().all() == ["batch.completed"]


def test_cancels_leases_and_answers_at_once_wait_for_each_other(store: Store) -> None:
    """Many threads on few batches: nobody waits in a circle, and the counts add up."""
    made = [make(store, 60) for _ in range(3)]
    problems: list[BaseException] = []

    def work(leases: BatchLeases) -> None:
        try:
            while waiting := leases.waiting():
                for each in waiting:
                    held = leases.lease(each.batch_id, num_items=5, num_bytes=1 << 20)
                    leases.answer([answer(one) for one in held])
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(process(store.database)[1],)) for _ in range(3)]
    for thread in threads:
        thread.start()
    rows = BatchRows(store.database)
    for batch in made[:2]:
        rows.cancel(batch.id, None)
    sweep.stop(store.database)
    for thread in threads:
        thread.join()
    assert problems == []
    assert {rows.get(batch.id, None).status for batch in made[:2]} <= {"canceled", "completed"}  # whichever was first
    assert rows.get(made[2].id, None).status == "completed"
    for batch in made:
        check(store.database, batch.id)


def test_interactive_requests_are_seen_while_they_run(store: Store) -> None:
    _, leases = process(store.database)
    batch = make(store, 1)
    leases.answer([answer(each) for each in lease(leases, batch, 1)])
    assert not leases.interactive()
    with write(store.database) as connection:
        connection.execute(update(usage).values(status="running"))
    assert leases.interactive()


def test_deleting_stops_and_hides(store: Store) -> None:
    batch = make(store, 5, url="http://hooks.example.com/")
    _, leases = process(store.database)
    held = lease(leases, batch, 2)
    rows = BatchRows(store.database)
    rows.delete(batch.id)
    for call in (rows.delete, partial(rows.get, workspace_id=None), partial(rows.cancel, workspace_id=None)):
        with pytest.raises(Missing):
            call(batch.id)
    assert lease(leases, batch, 1) == []
    assert len(leases.answer([answer(each) for each in held])) == 2  # what ran has finished, and is billed
    sweep.forget(store.database, timedelta(days=29))
    with read(store.database) as connection:
        assert connection.execute(select(func.count()).select_from(batches)).scalar_one() == 0
        assert connection.execute(select(func.count()).select_from(usage)).scalar_one() == 2
        assert connection.execute(select(func.count()).select_from(webhook_deliveries)).scalar_one() == 0


# ---------------------------------------------------------------------------------------------- whatever happens


def check(database: Engine, batch_id: str) -> None:
    """The counts are those of the items; what has ended is billed exactly as it is answered."""
    with read(database) as connection:
        row = connection.execute(select(batches).where(batches.c.id == batch_id)).mappings().one()
        states = Counter(
            connection.execute(select(batch_items.c.state).where(batch_items.c.batch_id == batch_id)).scalars()
        )
        owned = select(func.count()).where(batch_items.c.batch_id == batch_id, batch_items.c.owner.is_not(None))
        assert connection.execute(owned).scalar_one() == states["processing"]
        billed = select(func.count()).where(usage.c.request_id.like(f"{batch_id}%"))
        assert connection.execute(billed).scalar_one() == states["succeeded"]
        delivered = select(func.count()).where(webhook_deliveries.c.batch_id == batch_id)
        wanted = row["ended_at"] is not None and row["webhook_url"] is not None and row["deleted_at"] is None
        assert connection.execute(delivered).scalar_one() == int(wanted)
    assert sum(states.values()) == row["num_total"]
    for kind in ("processing", "succeeded", "errored", "canceled", "expired"):
        assert row[f"num_{kind}"] == states[kind], (kind, dict(row), states)
    if row["ended_at"] is not None:
        assert states["queued"] == states["processing"] == 0


MOVES = ("lease", "answer", "answer", "give back", "twice", "die", "wake", "requeue", "sweep", "cancel", "expire")
MOVE = st.tuples(st.sampled_from(MOVES), st.integers(0, 2), st.integers(1, 4))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 9), st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 2), st.integers(1, 4)), max_size=40)
)
def test_any_order_of_events_answers_and_bills_once(
    store: Store, count: int, moves: list[tuple[str, int, int]]
) -> None:
    """Three processes lease, answer, die and come back while the batch is canceled or expires; then one finishes it."""
    batch = make(store, count, url="http://hooks.example.com/")
    workers = [process(store.database) for _ in range(3)]
    held: list[list[Leased]] = [[], [], []]
    answered: Counter[int] = Counter()
    rows = BatchRows(store.database)

    def say(who: int, answers: list[Answer]) -> None:
        for each in workers[who][1].answer(answers):
            answered[each.leased.index] += each.state != "queued"

    def wake(who: int) -> None:
        with write(store.database) as connection:
            connection.execute(delete(processes).where(processes.c.id == workers[who][0]))
            values = {"id": workers[who][0], "started_at": 0, "heartbeat_at": now_ms()}
            connection.execute(insert(processes).values(values))

    steps: dict[str, Callable[[int, int], object]] = {
        "lease": lambda who, n: held[who].extend(lease(workers[who][1], batch, n)),
        "answer": lambda who, n: say(who, [answer(each, ("succeeded", "errored")[n % 2]) for each in held[who][:n]]),
        "give back": lambda who, n: say(who, [Answer(each, "queued", None, None) for each in held[who][-n:]]),
        "twice": lambda who, n: say(who, [answer(each) for each in held[(who + 1) % 3][:n]]),
        "die": lambda who, n: die(store.database, workers[who][0]),
        "wake": lambda who, n: wake(who),
        "requeue": lambda who, n: workers[who][1].requeue_dead(),
        "sweep": lambda who, n: sweep.stop(store.database),
        "cancel": lambda who, n: rows.cancel(batch.id, None) if n == 4 else None,
        "expire": lambda who, n: expire(store.database, batch.id, really=n == 4),
    }
    for name, who, n in moves:
        steps[name](who, n)
        check(store.database, batch.id)
    for who in range(3):
        die(store.database, workers[who][0])
    _, last = process(store.database)
    last.requeue_dead()
    sweep.stop(store.database)
    rest = lease(last, batch, 100)
    for each in last.answer([answer(each) for each in rest]):
        answered[each.leased.index] += 1
    check(store.database, batch.id)
    assert rows.get(batch.id, None).ended_at is not None
    assert max(answered.values(), default=0) <= 1


def expire(database: Engine, batch_id: str, *, really: bool) -> None:
    if really:
        with write(database) as connection:
            connection.execute(update(batches).where(batches.c.id == batch_id).values(expires_at=now_ms()))
    sweep.stop(database)
