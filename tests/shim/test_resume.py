"""An engine is lost while it replies: the client's stream goes on, nothing lost or repeated, nothing counted twice."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from sqlalchemy import text as sql
from support.scripted_engine import ScriptedEngine, Seen
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines import engines, vitals

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
UNIT = "é🦊"


def message(count: int) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": f"COUNT {count} {UNIT}"}], "max_tokens": 1500}


def text(count: int) -> str:
    return "".join(f"{i}{UNIT} " for i in range(count))


class Reader(threading.Thread):
    """A client in a thread: one reply, streamed or whole."""

    def __init__(self, shim: ShimServer, count: int, path: str = "/v2/messages/stream") -> None:
        super().__init__(daemon=True)
        self.shim, self.count, self.path = shim, count, path
        self.status = 0
        self.body = b""
        self.deltas = threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        with self.shim.client() as client, client.stream("POST", self.path, json=message(self.count)) as reply:
            self.status = reply.status_code
            for piece in reply.iter_bytes():
                self.body += piece
                for _ in range(piece.count(b"content_block_delta")):
                    self.deltas.release()

    def wait_for_deltas(self, number: int) -> None:
        for _ in range(number):
            assert self.deltas.acquire(timeout=60)

    def result(self) -> tuple[str, dict[str, Any]]:
        """The text and the last event of a stream."""
        self.join(60)
        assert not self.is_alive()
        assert self.status == 200
        events = [json.loads(line[6:]) for line in self.body.decode().splitlines() if line.startswith("data: ")]
        kinds = [event["type"] for event in events]
        assert kinds.count("message_start") == 1
        deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
        return "".join(deltas), events[-1] if events[-1]["type"] == "error" else events[-2]


def test_the_stream_goes_on_at_the_restarted_engine(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    engine.cached_tokens = 3
    shim = make_shim(engine)
    engine.pause()
    reader = Reader(shim, 30)
    engine.permit(10)
    until(lambda: text(10).encode() in _joined(reader), "ten tokens")
    engine.cached_tokens = 5  # the second attempt finds more in the cache; the client has been told 3
    engine.kill()
    engine.start()
    engine.wait_for(lambda seen: len(seen.submitted) == 2, "the resubmission")
    engine.free_run()
    engine.permit(1)
    found, last = reader.result()
    assert found == text(30)
    assert last["usage"] == {"output_tokens": 30}
    assert b'"cache_read_input_tokens":3' in reader.body
    first, second = (submit.request for submit in engine.seen.submitted)
    assert not first.HasField("resume")
    assert list(second.resume.forced_ids) == list(range(10))
    assert second.resume.emitted_bytes == len(text(10).encode())
    assert (second.resume.attempt, second.resume.prompt_tokens, second.resume.max_tokens) == (1, 7, 1500)
    assert second.resume.model_revision == "r1"
    assert second.sampling.seed == first.sampling.seed
    assert second.chat == first.chat
    until(lambda: [row[0] for row in usage_rows(shim)] == ["completed"], "the row is settled")
    assert usage_rows(shim) == [("completed", 4, 3, 30)]


def _joined(reader: Reader) -> bytes:
    """All delta text so far, whatever way it was cut into events."""
    return b"".join(re.findall(rb'"text_delta","text":"([^"]*)"', reader.body))


def usage_rows(shim: ShimServer) -> list[tuple[Any, ...]]:
    with shim.store.database.connect() as connection:
        query = "SELECT status, input_tokens, cache_read_input_tokens, output_tokens FROM usage ORDER BY created_at"
        return [tuple(row) for row in connection.execute(sql(query))]


def test_a_whole_reply_goes_on_too(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    reader = Reader(shim, 30, "/v2/messages")
    engine.wait_for(lambda seen: len(seen.submitted) == 1, "the request")
    engine.permit(10)
    generation = _only(shim)
    until(lambda: len(generation._ids) == 10, "ten tokens")
    engine.kill()
    engine.start()
    engine.free_run()
    engine.permit(1)
    reader.join(60)
    assert reader.status == 200
    assert f'"text":"{text(30)}"'.encode() in reader.body


def _only(shim: ShimServer) -> Any:
    until(lambda: any(session.live for session in shim.engines.sessions), "a request is placed")
    (generation,) = [g for session in shim.engines.sessions for g in session.live]
    return generation


def test_sixteen_streams_and_ten_deaths(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    readers = [Reader(shim, 600 + i) for i in range(16)]
    engine.wait_for(lambda seen: len(seen.submitted) == 16, "all are there")
    for _ in range(10):
        before = _num_tokens(shim)
        engine.permit(16 * 3)
        until(partial(_each_grew, shim, before), "each has new tokens")
        engine.kill()
        engine.start()
        until(lambda: _num_live(shim) == 16, "all are back")
    engine.free_run()
    engine.permit(16)
    for reader in readers:
        found, last = reader.result()
        assert found == text(reader.count)
        assert last["usage"]["output_tokens"] == reader.count


def _num_tokens(shim: ShimServer) -> dict[Any, int]:
    return {g: len(g._ids) for session in shim.engines.sessions for g in list(session.live)}


def _has_submitted(number: int, seen: Seen) -> bool:
    return len(seen.submitted) == number


def _each_grew(shim: ShimServer, before: dict[Any, int]) -> bool:
    return all(number > before[generation] for generation, number in _num_tokens(shim).items())


def _num_live(shim: ShimServer) -> int:
    return sum(g.answer is None for session in shim.engines.sessions for g in list(session.live))


def test_the_stream_goes_on_at_another_engine(make_engine: Engines, make_shim: Shims) -> None:
    one, two = make_engine("one"), make_engine("two")
    shim = make_shim(one, two)
    until(lambda: all(session.connected for session in shim.engines.sessions), "both are connected")
    one.pause()
    two.pause()
    reader = Reader(shim, 20)
    until(lambda: one.seen.submitted or two.seen.submitted, "the request")
    first, second = (one, two) if one.seen.submitted else (two, one)
    first.permit(5)
    until(lambda: text(5).encode() in _joined(reader), "five tokens")
    second.free_run()
    first.kill()
    found, _ = reader.result()
    assert found == text(20)
    assert len(second.seen.submitted) == 1


def test_work_is_spread_and_a_draining_engine_gets_none(make_engine: Engines, make_shim: Shims) -> None:
    one, two = make_engine("one"), make_engine("two")
    shim = make_shim(one, two)
    until(lambda: all(session.connected for session in shim.engines.sessions), "both are connected")
    one.pause()
    two.pause()
    readers = [Reader(shim, 3)]
    until(lambda: len(one.seen.submitted) + len(two.seen.submitted) == 1, "the first")
    readers.append(Reader(shim, 3))
    until(lambda: len(one.seen.submitted) == len(two.seen.submitted) == 1, "the second, on the other engine")
    one.drain()
    until(lambda: shim.engines.sessions[0].draining, "the first engine drains")
    readers += [Reader(shim, 3) for _ in range(3)]
    two.wait_for(lambda seen: len(seen.submitted) == 4, "the others")
    for engine in (one, two):
        engine.free_run()
        engine.permit(10)
    assert [reader.result()[0] for reader in readers] == [text(3)] * 5
    assert len(one.seen.submitted) == 1
    two.drain()
    until(lambda: shim.engines.sessions[1].draining, "the second drains too")
    with shim.client() as client:
        refused = client.post("/v2/messages", json=message(3))
        assert refused.status_code == 503
        assert refused.headers["retry-after"]


def test_a_full_engine_is_passed_over(make_engine: Engines, make_shim: Shims) -> None:
    one, two = make_engine("one"), make_engine("two")
    shim = make_shim(one, two)
    until(lambda: all(session.connected for session in shim.engines.sessions), "both are connected")
    one.refuse = pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL)
    with shim.client() as client:
        for _ in range(3):
            assert client.post("/v2/messages", json=message(3)).status_code == 200
        two.refuse = one.refuse
        assert client.post("/v2/messages", json=message(3)).status_code == 503


def test_another_model_ends_the_stream(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    reader = Reader(shim, 30)
    engine.permit(5)
    reader.wait_for_deltas(1)
    engine.kill()
    engine.revision = "r2"
    engine.start()
    found, last = reader.result()
    assert text(30).startswith(found)
    assert last["type"] == "error"
    assert "replaced" in last["error"]["message"]


def test_a_resubmission_that_finds_no_room_waits(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    reader = Reader(shim, 30)
    engine.permit(5)
    reader.wait_for_deltas(1)
    engine.kill()
    engine.refuse_resume = pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL)
    engine.start()
    engine.wait_for(lambda seen: len(seen.submitted) >= 3, "two refusals")
    engine.refuse_resume = None
    engine.free_run()
    engine.permit(1)
    assert reader.result()[0] == text(30)


def test_no_engine_for_too_long(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine, resume_s=0.3)
    engine.pause()
    stream, whole = Reader(shim, 30), Reader(shim, 30, "/v2/messages")
    engine.wait_for(lambda seen: len(seen.submitted) == 2, "both")
    engine.permit(10)
    stream.wait_for_deltas(1)
    engine.kill()
    _, last = stream.result()
    assert last["error"]["type"] == "overloaded_error"
    whole.join(60)
    assert whole.status == 503


def test_a_request_that_may_be_what_kills_engines(make_engine: Engines, make_shim: Shims) -> None:
    """Running in three engines that died and never a token: it is failed, not tried for ever."""
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    reader = Reader(shim, 30)
    for attempt in range(1, 4):
        engine.wait_for(partial(_has_submitted, attempt), "an attempt")
        until(lambda: _only(shim)._running, "it runs")
        engine.kill()
        engine.start()
    _, last = reader.result()
    assert last["error"]["type"] == "api_error"
    assert len(engine.seen.submitted) == 3


def test_requests_that_wait_are_never_failed_for_deaths(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.hold_starts(True)
    reader = Reader(shim, 30)
    for attempt in range(1, 6):
        engine.wait_for(partial(_has_submitted, attempt), "an attempt")
        until(lambda: _num_live(shim) == 1, "it is accepted")
        engine.kill()
        engine.start()
    engine.hold_starts(False)
    assert reader.result()[0] == text(30)


def test_a_client_that_leaves_while_no_engine_is_there(make_engine: Engines, make_shim: Shims) -> None:
    """It is not submitted again."""
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    with shim.client() as client, client.stream("POST", "/v2/messages/stream", json=message(9)) as reply:
        assert reply.status_code == 200
        engine.kill()
        until(lambda: shim.engines._resuming, "it waits")
    until(lambda: not shim.engines._resuming, "it is given up")
    engine.start()
    shim.wait_ready()
    assert len(engine.seen.submitted) == 1


def test_an_engine_that_hangs_is_left(make_engine: Engines, make_shim: Shims, monkeypatch: Any) -> None:
    """A process that is there and does not answer is as good as dead."""
    monkeypatch.setattr(vitals, "REFRESH_S", 0.05)
    monkeypatch.setattr(vitals, "CALL_TIMEOUT_S", 0.3)
    monkeypatch.setattr(vitals, "LAST_CALL_S", 0.3)
    engine = make_engine()
    shim = make_shim(engine)
    engine.hang(True)
    until(lambda: not shim.engines.sessions[0].connected, "the session is dropped")
    engine.hang(False)
    shim.wait_ready()
    with shim.client() as client:
        assert client.post("/v2/messages", json=message(3)).status_code == 200


def test_an_answer_that_was_not_heard_in_time_costs_no_connection(
    make_engine: Engines, make_shim: Shims, monkeypatch: Any
) -> None:
    """As on a machine that has no time for the shim: one call is too late, the next is not."""
    monkeypatch.setattr(vitals, "REFRESH_S", 0.05)
    monkeypatch.setattr(vitals, "LAST_CALL_S", 60.0)
    engine = make_engine()
    make_shim(engine)
    monkeypatch.setattr(vitals, "CALL_TIMEOUT_S", 0.1)
    for _ in range(3):
        asked = len(engine.seen.listings)
        engine.late_listings = 1
        until(lambda: len(engine.seen.listings) >= asked + 3 and not engine.late_listings, "it is asked again")  # noqa: B023
    assert len(engine.seen.hellos) == 1


def test_a_request_waits_for_a_connection_that_has_just_broken(
    make_engine: Engines, make_shim: Shims, monkeypatch: Any
) -> None:
    """The engine lives: a 503 that says that there is none would be wrong."""
    monkeypatch.setattr(engines, "CONNECT_S", 60.0)
    engine = make_engine()
    shim = make_shim(engine)
    engine.hang(True)
    engine.disconnect()
    until(lambda: not shim.engines.sessions[0].connected, "it is noticed")
    bodies = shim.services.bodies
    stream = Reader(shim, 30)
    until(lambda: bodies.used, "it has been read")
    size, whole = bodies.used, Reader(shim, 30, "/v2/messages")
    until(lambda: bodies.used == 2 * size, "so has the other")
    engine.hang(False)
    assert stream.result()[0] == text(30)
    whole.join(60)
    assert whole.status == 200


def test_a_request_that_loses_its_connection_is_asked_again(
    make_engine: Engines, make_shim: Shims, monkeypatch: Any
) -> None:
    monkeypatch.setattr(engines, "CONNECT_S", 60.0)
    engine = make_engine()
    shim = make_shim(engine)
    engine.accept_silently = True
    reader = Reader(shim, 30)
    engine.wait_for(partial(_has_submitted, 1), "the request")
    engine.accept_silently = False
    engine.disconnect()
    assert reader.result()[0] == text(30)


def test_nobody_waits_for_an_engine_that_is_not_there(make_engine: Engines, make_shim: Shims, monkeypatch: Any) -> None:
    monkeypatch.setattr(engines, "CONNECT_S", 600.0)
    engine = make_engine()
    shim = make_shim(engine)
    engine.kill()
    with shim.client() as client:
        assert client.post("/v2/messages", json=message(3)).status_code == 503
