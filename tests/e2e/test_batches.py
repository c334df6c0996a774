"""Batches over real processes that are killed: every request answered once, billed once, and one webhook."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from standardwebhooks import Webhook
from support.edge import HAIKU, SONNET, Edge, restart, start, wait_until
from support.webhook_receiver import Receiver, receiving, status

INPUT_PRICE = {HAIKU: 0.25, SONNET: 3.0}  # US dollars per million tokens, as the demo installation has them
OUTPUT_PRICE = {HAIKU: 1.25, SONNET: 15.0}


def requests(count: int) -> list[dict[str, Any]]:
    """Small ones of two models; every other in the `params` form."""
    made: list[dict[str, Any]] = []
    for i in range(count):
        body = {
            "model": (HAIKU, SONNET)[i % 2],
            "max_tokens": 1 + i % 4,
            "messages": [{"role": "user", "content": f"Tell me about the number {i % 97}."}],
        }
        made.append({"custom_id": f"n{i}", "params": body} if i % 3 else {"custom_id": f"n{i}", **body})
    return made


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def part(edge: Edge, word: str) -> list[psutil.Process]:
    """The running children of the installation whose command line names `word`."""
    found = []
    for process in psutil.Process(edge.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if word in process.cmdline():
                found.append(process)
    return found


class Running:
    """An installation that is killed part by part, and started again where all of it was."""

    def __init__(self, edge: Edge, rng: random.Random) -> None:
        self.edge = edge
        self.rng = rng
        self.killed: list[str] = []

    def kill(self, what: str) -> None:
        self.killed.append(what)
        match what:
            case "shim":
                kill(self.rng.choice(self.parts("aiexport_edge.shim.server")).pid)
            case "engine":
                kill(self.parts("aiexport_edge.engine")[0].pid)
            case "core":
                kill(self.core())
            case "supervisor":
                self.edge.process.kill()
                self.edge.process.wait(60)
                self.edge = restart(self.edge)

    def core(self) -> int:
        """Its process. Looked at once: 0, which stands for none, would kill this process and all of its own."""
        while not (pid := self.edge.stats().core_pid):
            time.sleep(0.02)
        return pid

    def parts(self, word: str) -> list[psutil.Process]:
        """At least one: what has been killed before is started again soon."""
        while not (found := part(self.edge, word)):
            time.sleep(0.02)
        return found

    def wait(self, batch_id: str, what: str, number: int) -> None:
        """Until that count of the batch is as high."""
        with self.edge.client() as client:

            def reached() -> bool:
                time.sleep(0.05)  # a call over HTTP is work for the machine too
                counts = self.counts(client, batch_id)
                return counts is not None and counts[what] >= number

            wait_until(reached, f"{number} {what} after {self.killed}", 600)

    def counts(self, client: httpx.Client, batch_id: str) -> Counter[str] | None:
        """The batch's counts, which always add up; None while nobody answers."""
        try:
            batch = client.get(f"/v2/batch/{batch_id}").raise_for_status().json()
        except httpx.HTTPError:
            return None
        counts = Counter(batch["request_counts"])
        total = counts.pop("total")
        assert sum(counts.values()) == total, batch
        counts["ended"] = batch["ended_at"] is not None
        return counts


def run_batch_through_kills(tmp_path: Path, num_requests: int, kills: list[str], seed: int) -> None:
    """A batch whose installation loses a part each time that another share of it is done."""
    rng = random.Random(seed)
    config = tmp_path / "edge.toml"
    config.write_text('[shim]\nworkers = 2\n[webhooks]\nallow = ["127.0.0.1"]\n')
    with receiving(status(503), status(204)) as receiver:
        running = Running(start(tmp_path / "state", config), rng)
        try:
            secret = running.edge.cli("webhooks", "secret", "--workspace", "tests")["secret"]
            body = {"requests": requests(num_requests), "webhook_url": receiver.url}
            with running.edge.client() as client:
                accepted = client.post("/v2/batch", json=body)
            assert accepted.status_code == 202, accepted.text
            batch_id = accepted.json()["id"]
            moments = sorted(rng.randrange(num_requests * 9 // 10) for _ in kills)
            for moment, what in zip(moments, kills, strict=True):
                running.wait(batch_id, "succeeded", moment)
                running.kill(what)
            running.wait(batch_id, "ended", 1)
            check_results(running.edge, batch_id, num_requests)
            receiver.wait(2)  # the first try was refused
            check_webhook(running.edge, receiver, secret, batch_id)
        finally:
            running.edge.stop()


def check_results(edge: Edge, batch_id: str, num_requests: int) -> None:
    with edge.client() as client:
        batch = client.get(f"/v2/batch/{batch_id}").json()
        text = client.get(f"/v2/batch/{batch_id}/results").raise_for_status().text
    assert batch["status"] == "completed"
    assert batch["request_counts"]["succeeded"] == num_requests
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["index"] for line in lines] == list(range(num_requests))
    assert [line["custom_id"] for line in lines] == [f"n{i}" for i in range(num_requests)]
    assert {line["result"]["type"] for line in lines} == {"succeeded"}
    messages = [line["result"]["message"] for line in lines]
    assert len({message["id"] for message in messages}) == num_requests
    assert [message["model"] for message in messages] == [(HAIKU, SONNET)[i % 2] for i in range(num_requests)]
    used: Counter[str] = Counter()
    cost = 0.0
    for message in messages:
        usage = Counter(message["usage"])
        used += usage
        prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
        price = INPUT_PRICE[message["model"]] * prompt + OUTPUT_PRICE[message["model"]] * usage["output_tokens"]
        cost += price / 2 / 1e6
    with edge.client() as client:
        billed = client.get("/v2/usage").raise_for_status().json()["total"]
    assert billed["requests"] == num_requests
    assert {name: billed[name] for name in used} == dict(used)
    assert float(billed["cost_usd"]) == pytest.approx(cost, rel=1e-9)


def check_webhook(edge: Edge, receiver: Receiver, secret: str, batch_id: str) -> None:
    ids = set()
    for heard in receiver.heard:
        ids.add(heard.headers["webhook-id"])
        event = Webhook(secret).verify(heard.body, heard.headers)
        assert event["type"] == "batch.completed"
        assert event["data"]["id"] == batch_id
    assert len(ids) == 1
    wait_until(lambda: edge.cli("webhooks", "list")[0]["state"] == "delivered", "the delivery is noted")
    (delivery,) = edge.cli("webhooks", "list")
    assert {delivery["id"]} == ids
    assert delivery["batch_id"] == batch_id


@pytest.mark.slow
def test_batch_survives_kills_of_every_part(tmp_path: Path) -> None:
    run_batch_through_kills(tmp_path, 240, ["shim", "core", "supervisor"], seed=5)


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_ten_thousand_requests_survive_ten_kills(tmp_path: Path) -> None:
    kills = ["shim", "shim", "shim", "engine", "engine", "engine", "core", "core", "core", "supervisor"]
    random.Random(11).shuffle(kills)
    run_batch_through_kills(tmp_path, 10_000, kills, seed=12)


@pytest.mark.prove
def test_the_largest_batch_is_taken_in_without_holding_it(tmp_path: Path) -> None:
    """10,000 requests in 250 MB: the shim grows by a small part of that."""
    config = tmp_path / "edge.toml"
    config.write_text("[shim]\nworkers = 1\n")
    edge = start(tmp_path / "state", config)
    try:
        (shim,) = part(edge, "aiexport_edge.shim.server")
        filler = "x" * 24_900

        def pieces() -> Iterator[bytes]:
            yield b'{"requests":['
            for i in range(10_000):
                body = {"model": HAIKU, "max_tokens": 1, "messages": [{"role": "user", "content": f"{i} {filler}"}]}
                yield (b"," if i else b"") + json.dumps(body).encode()
            yield b"]}"

        with edge.client() as client:
            reply = client.post("/v2/batch", content=pieces())
            assert reply.status_code == 202, reply.text
            peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{shim.pid}/status").read_text())[0]) >> 10
            assert reply.json()["request_counts"]["total"] == 10_000
            client.delete(f"/v2/batch/{reply.json()['id']}/cancel").raise_for_status()
        assert peak < 160, f"{peak} MiB"
    finally:
        edge.stop()
