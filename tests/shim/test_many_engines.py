"""Several engines behind one shim: addresses that come and go, engines that are ill, requests that go elsewhere."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.edge import free_port
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim import services
from aiexport_edge.shim.engines import outliers, vitals
from aiexport_edge.shim.engines.discovery import Discovery
from aiexport_edge.shim.engines.routing import Policy, Reason
from aiexport_edge.shim.engines.session import EngineState

Make = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
LONG = "The tide tables of a small harbour, for everyone who asks. " * 30


def message(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": text}], "max_tokens": 1500, **fields}


def post(shim: ShimServer, text: str = "COUNT 3", **fields: Any) -> int:
    with shim.client() as client:
        return client.post("/v2/messages", json=message(text, **fields)).status_code


def connected(shim: ShimServer, number: int) -> None:
    until(lambda: sum(each.connected for each in shim.engines.sessions) == number, f"{number} are connected")


def states(shim: ShimServer) -> Counter[EngineState]:
    return Counter(each.state for each in shim.engines.sessions)


class Running(threading.Thread):
    """One request in a thread."""

    def __init__(self, shim: ShimServer, text: str) -> None:
        super().__init__(daemon=True)
        self._shim, self._text = shim, text
        self.reply: Any = None
        self.start()

    def run(self) -> None:
        with self._shim.client() as client:
            self.reply = client.post("/v2/messages", json=message(self._text))

    def text(self) -> str:
        self.join(60)
        assert self.reply.status_code == 200, self.reply.text
        return str(self.reply.json()["content"][0]["text"])


def count(number: int) -> str:
    return "".join(f"{index} " for index in range(number))


# ---------------------------------------------------------------------------------------------------- names


class Names:
    """What a name resolves to, as the test says."""

    def __init__(self) -> None:
        self.addresses: list[str] | OSError = []
        self.num_looks = 0

    async def lookup(self, host: str, port: int) -> Sequence[str]:
        assert (host, port) == ("engines.internal", self.port)
        self.num_looks += 1
        if isinstance(self.addresses, OSError):
            raise self.addresses
        return self.addresses

    port = 0

    def settle(self) -> None:
        """Two more looks: what the last one found has been told."""
        seen = self.num_looks
        until(lambda: self.num_looks >= seen + 2, "it was looked up")


@pytest.fixture
def on_port() -> Iterator[Callable[..., ScriptedEngine]]:
    """Engines on addresses of loopback, all on the port that the first was given."""
    made: list[ScriptedEngine] = []

    def make(host: str, port: int) -> ScriptedEngine:
        engine = ScriptedEngine(f"{host}:{port}")
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()


def test_addresses_come_and_go_while_streams_run(
    on_port: Callable[..., ScriptedEngine], tmp_path: Path, unused_port: int
) -> None:
    names = Names()
    names.port = port = unused_port
    one, two = on_port("127.0.0.2", port), on_port("127.0.0.3", port)
    names.addresses = ["127.0.0.2"]
    shim = ShimServer(tmp_path / "state", (f"dns:///engines.internal:{port}",), resolve_s=0.05, lookup=names.lookup)
    shim.start()
    try:
        shim.wait_ready()
        one.pause()
        first = Running(shim, "COUNT 20")
        one.wait_for(lambda seen: len(seen.submitted) == 1, "the request")
        names.addresses = ["127.0.0.2", "127.0.0.3"]
        connected(shim, 2)
        names.addresses = ["127.0.0.3"]
        until(lambda: states(shim)[EngineState.LEAVING] == 1, "the first leaves")
        for _ in range(4):
            assert post(shim) == 200  # at the second
        assert len(one.seen.submitted) == 1
        assert len(two.seen.submitted) == 4
        # A name service that is away, or knows nothing, takes nobody away.
        for silence in (OSError("no such name"), list[str]()):
            names.addresses = silence
            names.settle()
            assert states(shim) == {EngineState.LEAVING: 1, EngineState.SERVING: 1}
        names.addresses = ["127.0.0.3"]
        one.free_run()
        one.permit(1)
        assert first.text() == count(20)  # to its end where it was
        until(lambda: len(shim.engines.sessions) == 1, "the first is gone")
        names.addresses = ["127.0.0.2", "127.0.0.3"]
        connected(shim, 2)
    finally:
        shim.stop()


def test_a_real_name(on_port: Callable[..., ScriptedEngine], tmp_path: Path, unused_port: int) -> None:
    engine = on_port("127.0.0.1", unused_port)
    shim = ShimServer(tmp_path / "state", (f"dns:///localhost:{unused_port}",))
    shim.start()
    try:
        shim.wait_ready()
        assert post(shim) == 200
        assert len(engine.seen.submitted) == 1
    finally:
        shim.stop()


@pytest.fixture
def unused_port() -> int:
    return free_port()


# ---------------------------------------------------------------------------------------------------- elsewhere


def test_an_engine_that_does_not_answer_costs_a_wait_not_a_request(make_engine: Make, make_shim: Shims) -> None:
    one, two = make_engine("one"), make_engine("two")
    shim = make_shim(one, two, answer_timeout_s=3.0, policy=Policy.ROUND_ROBIN)
    connected(shim, 2)
    one.accept_silently = True
    posted = 0
    while not one.seen.submitted:
        assert post(shim) == 200
        posted += 1
    assert len(two.seen.submitted) == posted
    two.accept_silently = True
    shim.engines._answer_timeout_s = 0.2
    assert post(shim) == 503


def test_a_broken_engine_is_passed_over_then_ejected_then_tried(
    make_engine: Make, make_shim: Shims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers, "FIRST_EJECTION_S", 1.0)
    one, two = make_engine("one"), make_engine("two")
    shim = make_shim(one, two)
    connected(shim, 2)
    one.refuse = pb.ErrorDetail(code=pb.ERROR_INTERNAL)
    asked = 0
    while not shim.engines.sessions[0].outlier.num_ejections:
        assert post(shim) == 200
        asked += 1
        assert asked < 50
    assert len(one.seen.submitted) == outliers.MAX_FAILURES
    one.refuse = None
    until(lambda: shim.engines.sessions[0].state is EngineState.TRIAL, "its time is over")
    until(lambda: post(shim) == 200 and shim.engines.sessions[0].state is EngineState.SERVING, "it is healed")


def test_the_last_engine_is_not_given_up(make_engine: Make, make_shim: Shims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "FIRST_EJECTION_S", 300.0)
    engine = make_engine()
    shim = make_shim(engine)
    engine.refuse = pb.ErrorDetail(code=pb.ERROR_INTERNAL)
    assert [post(shim) for _ in range(outliers.MAX_FAILURES)] == [500] * outliers.MAX_FAILURES
    assert states(shim)[EngineState.EJECTED] == 1
    engine.refuse = None
    assert post(shim) == 200
    assert states(shim)[EngineState.SERVING] == 1


def test_what_can_never_be_taken_is_asked_once(make_engine: Make, make_shim: Shims) -> None:
    one, two = make_engine("one"), make_engine("two")
    shim = make_shim(one, two)
    connected(shim, 2)
    one.refuse = two.refuse = pb.ErrorDetail(code=pb.ERROR_INVALID, message="no", field="chat")
    assert post(shim) == 400
    assert len(one.seen.submitted) + len(two.seen.submitted) == 1


def test_no_more_than_two_engines_are_lost_over_one_request(make_engine: Make, make_shim: Shims) -> None:
    engines = [make_engine(f"engine{number}") for number in range(4)]
    for engine in engines:
        engine.refuse = pb.ErrorDetail(code=pb.ERROR_INTERNAL)
    shim = make_shim(*engines)
    connected(shim, 4)
    assert post(shim) == 500
    assert sum(len(engine.seen.submitted) for engine in engines) == 2


def test_an_engine_that_says_it_serves_nothing_gets_nothing(make_engine: Make, make_shim: Shims) -> None:
    one, two = make_engine("one"), make_engine("two")
    shim = make_shim(one, two)
    connected(shim, 2)
    one.set_serving(False)
    until(lambda: states(shim)[EngineState.UNHEALTHY] == 1, "it is noticed")
    assert [post(shim) for _ in range(3)] == [200] * 3
    assert len(two.seen.submitted) == 3
    one.set_serving(True)
    until(lambda: states(shim)[EngineState.SERVING] == 2, "it is back")


def test_an_engine_that_dies_again_and_again_is_left_alone(
    make_engine: Make, make_shim: Shims, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitals, "CHECK_S", 0.05)
    monkeypatch.setattr(outliers, "FIRST_EJECTION_S", 300.0)
    one, two = make_engine("one"), make_engine("two")
    shim = make_shim(one, two, policy=Policy.ROUND_ROBIN)
    connected(shim, 2)
    one.pause()
    readers: list[Running] = []
    for death in range(outliers.MAX_LOSSES):
        while len(one.seen.submitted) == death:
            readers.append(Running(shim, "COUNT 9"))
            readers[-1].join(0.2)
        one.kill()
        one.start()
        connected(shim, 2)
    assert [reader.text() for reader in readers] == [count(9)] * len(readers)
    assert states(shim)[EngineState.EJECTED] == 1
    seen = len(one.seen.submitted)
    assert [post(shim) for _ in range(4)] == [200] * 4
    assert len(one.seen.submitted) == seen


# ---------------------------------------------------------------------------------------------------- affinity


def test_conversations_stay_where_their_beginning_is(make_engine: Make, make_shim: Shims) -> None:
    """Twelve conversations of four turns over three engines: each engine has some, none has one of another's."""
    engines = [make_engine(f"engine{number}") for number in range(3)]
    shim = make_shim(*engines)
    connected(shim, 3)
    with shim.client() as client:
        for turn in range(4):
            for number in range(12):
                messages = [{"role": "user", "content": f"COUNT 3 of {number}: {LONG}"}]
                for past in range(turn):
                    messages += [
                        {"role": "assistant", "content": f"{past} {LONG[:200]}"},
                        {"role": "user", "content": f"COUNT 3 and then {past} of {number}"},
                    ]
                body = {"model": HAIKU, "messages": messages}
                assert client.post("/v2/messages", json=body).status_code == 200
    held = [
        Counter(submit.request.chat.messages[0].content[0].text[:14] for submit in engine.seen.submitted)
        for engine in engines
    ]
    assert sum(len(each) for each in held) == 12
    assert all(set(each.values()) == {4} for each in held if each)
    assert shim.engines.routed[Reason.PREFIX] == 36
    assert shim.engines.routed[Reason.HASH] == 12


def test_another_workspace_shares_nothing(make_engine: Make, make_shim: Shims) -> None:
    shim = make_shim(make_engine("one"), make_engine("two"))
    connected(shim, 2)
    shim.store.create_workspace("other", "enterprise")
    other = shim.store.create_key("other").key
    for key in (None, other):
        with shim.client(key) as client:
            assert client.post("/v2/messages", json=message(LONG)).status_code == 200
    assert shim.engines.routed[Reason.PREFIX] == 0


def test_a_shared_beginning_does_not_make_one_engine_hot(make_engine: Make, make_shim: Shims) -> None:
    engines = [make_engine(f"engine{number}") for number in range(2)]
    shim = make_shim(*engines)
    connected(shim, 2)
    for engine in engines:
        engine.hold_starts(True)
    readers = []
    for number in range(24):
        readers.append(Running(shim, f"COUNT 2 {LONG} {number}"))
        until(lambda: sum(len(engine.seen.submitted) for engine in engines) == len(readers), "it is placed")
    placed = sorted(len(engine.seen.submitted) for engine in engines)
    assert placed[0] >= 7
    for engine in engines:
        engine.hold_starts(False)
    for reader in readers:
        reader.text()


def test_load_of_other_clients_counts(make_engine: Make, make_shim: Shims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "CHECK_S", 0.02)
    one, two = make_engine("one"), make_engine("two")
    one.load = (40, 10)
    shim = make_shim(one, two)
    connected(shim, 2)
    until(lambda: shim.engines.sessions[0].load(for_batch=False) == 50, "its load is known")
    assert [post(shim) for _ in range(6)] == [200] * 6
    assert len(two.seen.submitted) == 6


def test_a_reply_goes_on_at_the_engine_with_the_same_weights(make_engine: Make, make_shim: Shims) -> None:
    """Of two others, one has a newer model: the reply goes on at the one that has the old one."""
    one, two, three = (make_engine(name) for name in ("one", "two", "three"))
    three.revision = "r2"
    for engine in (two, three):
        engine.set_serving(False)
    shim = make_shim(one, two, three)
    connected(shim, 3)
    one.pause()
    readers = [Running(shim, f"COUNT {20 + number}") for number in range(4)]
    one.wait_for(lambda seen: len(seen.submitted) == 4, "all are there")
    one.permit(20)
    for engine in (two, three):
        engine.set_serving(True)
    until(lambda: states(shim)[EngineState.SERVING] == 3, "all serve")
    one.kill()
    assert [reader.text() for reader in readers] == [count(20 + number) for number in range(4)]
    assert len(two.seen.submitted) == 4
    assert not three.seen.submitted


def test_what_is_counted(make_engine: Make, make_shim: Shims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "_MEASURE_S", 0.02)
    one, two = make_engine("one"), make_engine("two")
    one.cached_tokens = two.cached_tokens = 4
    shim = make_shim(one, two)
    connected(shim, 2)
    for _ in range(3):
        assert post(shim, LONG) == 200
    one.drain()
    held = [each for each in shim.engines.sessions if each.num_accepted]
    assert len(held) == 1
    engine = f'engine="{held[0].address}"'
    wanted = {
        f'aiexport_engine_state{{engine="{one.address}",state="draining"}} 1.0',
        f'aiexport_engine_state{{engine="{two.address}",state="serving"}} 1.0',
        f'aiexport_engine_prompt_tokens_total{{{engine},kind="cached"}} 12.0',
        f"aiexport_engine_accepted_total{{{engine}}} 3.0",
    }
    with httpx.Client(base_url=shim.admin_url) as admin:
        until(lambda: wanted <= set(admin.get("/metrics").text.splitlines()), "all is there")
        assert "draining" in admin.get("/console").text


def test_names_that_cannot_be_looked_up_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """One that is no name at all too; the others are looked up all the same."""
    told: list[list[str]] = []
    long = "x" * 300 + ".internal"

    async def test() -> None:
        discovery = Discovery([f"{long}:1", "no-such-name.invalid:1", "127.0.0.1:1"], every_s=0.01, retry_s=0.01)
        looking = asyncio.create_task(discovery.run(lambda found: told.append([each.address for each in found])))
        while len(told) < 3:
            await asyncio.sleep(0.01)
            assert not looking.done()
        looking.cancel()

    asyncio.run(asyncio.wait_for(test(), 60))
    assert told == [["127.0.0.1:1"]] * len(told)
    messages = [record.getMessage() for record in caplog.records]
    assert sum("no-such-name.invalid" in message for message in messages) == 1
    assert sum(long in message for message in messages) == 1
