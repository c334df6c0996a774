"""`/status`: the page, its JSON, and the history behind both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine
from sqlalchemy import text as sql
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import uptime
from aiexport_edge.shim.api.status import floor_percent, prefers_json
from aiexport_edge.shim.store import uptime_rows
from aiexport_edge.shim.store.database import open_database
from aiexport_edge.shim.store.uptime_rows import UptimeRows, share_covered

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
JSON = {"Accept": "application/json"}
DAY = 86_400_000


# ---------------------------------------------------------------------------------------------------- what is served


def test_json(make_engine: Engines, make_shim: Shims, monkeypatch: pytest.MonkeyPatch) -> None:
    """From real rows: it has been up since its first moment, and the first token took what the usage rows say."""
    monkeypatch.setattr(uptime, "BEAT_S", 0.02)
    monkeypatch.setattr(uptime, "LOOK_S", 0.02)
    engine = make_engine()
    shim = make_shim(engine)
    with shim.client("") as client:
        document = client.get("/status", headers=JSON).json()
        assert document["first_token_p50_ms"] is None
        with shim.client() as caller:
            body = {"model": HAIKU, "messages": [{"role": "user", "content": "COUNT 3"}]}
            assert caller.post("/v2/messages", json=body).status_code == 200
        until(
            lambda: client.get("/status", headers=JSON).json()["first_token_p50_ms"] is not None, "a reply is measured"
        )
        document = client.get("/status", headers=JSON).json()
    assert document["status"] == "operational"
    assert document["version"] == "2.4"
    assert {"id": HAIKU, "family": "haiku", "state": "ready"} in document["models"]
    assert document["availability_period"] == "since install"
    assert 0.9 < document["availability_30d"] <= 1
    assert abs((datetime.now(UTC) - datetime.fromisoformat(document["availability_since"])).total_seconds()) < 300
    with shim.store.database.connect() as connection:
        took = connection.execute(sql("SELECT first_token_at - created_at FROM usage")).scalar_one()
    assert document["first_token_p50_ms"] == took
    assert "acme" not in str(document)


def test_the_page_is_for_a_person(shim: ShimServer) -> None:
    with shim.client("") as client:
        page = client.get("/status", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "All systems operational" in page.text
    assert f"<code>{HAIKU}</code>" in page.text
    assert "since install" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text, "nothing is fetched from anywhere"
    assert "https://" not in page.text
    assert "acme" not in page.text


def test_degraded_and_down(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    with shim.client("") as client:
        engine.kill()
        until(lambda: client.get("/status", headers=JSON).json()["status"] == "down", "the engine is missed")
        assert "No model can be served" in client.get("/status").text
        engine.state = pb.MODEL_FAILED
        engine.start()
        until(
            lambda: client.get("/status", headers=JSON).json()["models"][0]["state"] == "failed", "the engine is back"
        )
        assert client.get("/status", headers=JSON).json()["status"] == "down"


@pytest.mark.parametrize(
    ("accept", "json"),
    [
        ("", False),
        ("*/*", False),
        ("text/html", False),
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/json, text/plain, */*", True),
        ("text/html, application/json;q=0.9", False),
        ("text/html;q=0.5, application/json", True),
        ("application/json;q=0", False),
        ("application/json;q=x", False),
    ],
)
def test_which_one_a_client_wants(accept: str, json: bool) -> None:
    assert prefers_json(accept) is json


def test_a_hundred_percent_means_nothing_is_missing() -> None:
    assert [floor_percent(share) for share in (1.0, 0.99999, 0.9998, 0.0)] == ["100.00", "99.99", "99.98", "0.00"]


# ---------------------------------------------------------------------------------------------------- history


class Clock:
    """The time of day, as a test sets it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(uptime_rows, "now_ms", clock)
    return clock


@pytest.fixture
def database(store_url: str) -> Iterator[Engine]:
    database = open_database(store_url)
    yield database
    database.dispose()


def beat_for(rows: UptimeRows, clock: Clock, milliseconds: int, *, serving: bool = True) -> None:
    end = clock.now + milliseconds
    while clock.now < end:
        rows.beat(serving=serving)
        clock.now = min(end, clock.now + 5000)
    rows.beat(serving=serving)


def test_downtime_is_a_gap(database: Engine, clock: Clock) -> None:
    rows = UptimeRows(database)
    assert rows.history().availability is None
    started = clock.now
    beat_for(rows, clock, 600_000)
    beat_for(rows, clock, 200_000, serving=False)  # up, and nothing to serve
    beat_for(rows, clock, 100_000)
    clock.now += 100_000  # dead
    history = UptimeRows(database).history()
    assert (history.since_ms, history.is_whole) == (started, False)
    assert history.availability == pytest.approx(0.7, abs=0.01)


def test_two_processes_cover_for_each_other(database: Engine, clock: Clock) -> None:
    one, other = UptimeRows(database), UptimeRows(database)
    for _ in range(20):
        one.beat(serving=True)
        clock.now += 5000
        other.beat(serving=True)
    for _ in range(20):
        clock.now += 5000
        other.beat(serving=True)
    assert one.history().availability == pytest.approx(1.0)


def test_the_window_is_thirty_days(database: Engine, clock: Clock) -> None:
    rows = UptimeRows(database)
    beat_for(rows, clock, 60_000)
    clock.now += 45 * DAY
    beat_for(rows, clock, 60_000)
    rows.prune()
    history = rows.history()
    assert history.is_whole
    assert history.since_ms == clock.now - 30 * DAY
    assert history.availability == pytest.approx(60_000 / (30 * DAY))
    with database.connect() as connection:
        assert connection.execute(sql("SELECT count(*) FROM uptime")).scalar_one() == 2, "the first of all stays"
    clock.now += 40 * DAY
    rows.prune()
    with database.connect() as connection:
        assert connection.execute(sql("SELECT count(*) FROM uptime")).scalar_one() == 1


@pytest.mark.parametrize("jump", [-10 * DAY, 10 * DAY])
def test_a_clock_that_jumps_is_no_uptime(database: Engine, clock: Clock, jump: int) -> None:
    rows = UptimeRows(database)
    beat_for(rows, clock, 600_000)
    clock.now += jump
    beat_for(rows, clock, 600_000)
    history = rows.history()
    assert history.availability is not None
    assert history.availability <= 1
    if jump > 0:
        assert history.availability < 0.01


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60))), st.integers(0, 30), st.integers(1, 30))
def test_the_share_covered_is_the_share_of_moments(stretches: list[tuple[int, int]], since: int, length: int) -> None:
    ordered = [(min(pair), max(pair)) for pair in stretches]
    moments = [any(a <= moment < b for a, b in ordered) for moment in range(since, since + length)]
    assert share_covered(ordered, since, since + length) == pytest.approx(sum(moments) / length)
