"""Streaming chats as they come, over all tiers, some about a picture, with a batch beside them; for any server of this
API.

    python -m locust -f benchmarks/locust/locustfile.py --headless -u 2 --host http://HOST:PORT --key KEY

One user sends every chat at the moment at which it is due, however long the others take (an open loop: a slow server
gets no fewer requests); another keeps one batch running. The run ends by itself when all have been answered, with
status 1 where a target is missed (`targets.toml`).
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from argparse import ArgumentParser
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Pool

from benchmarks.locust import arrivals, chats, measures
from locust import User, constant, events, task
from locust.contrib.fasthttp import FastHttpUser
from locust.env import Environment
from locust.exception import StopUser

BEAT_S = 0.02  # of the loop's own pulse
MAX_CHATS = 2000  # open at once; more come late, which the figures show
TIERS = {"haiku": 0.6, "sonnet": 0.3, "opus": 0.1}  # shares of the chats
BATCH_TOKENS = 32
PICTURES = "pictures"  # the chats about one, of whatever tier, by themselves
QUESTION = "What is in this picture?"
SIDE = 224  # of a picture, in pixels


class Run:
    """What this process has measured."""

    def __init__(self) -> None:
        self.tiers: dict[str, measures.Tier] = defaultdict(measures.Tier)
        self.lag_ms: list[float] = []
        self.busy_s = 0.0  # processor time of the chats' part
        self.seconds = 0.0


run = Run()


@events.init_command_line_parser.add_listener
def _options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("chats")
    group.add_argument("--key", default="", help="an API key")
    group.add_argument("--pattern", choices=("trace", "synthetic", "fixed"), default="synthetic")
    group.add_argument("--rate", type=float, default=2.0, help="chats a second, on average")
    group.add_argument("--seconds", type=float, default=60.0, help="for how long chats are sent")
    group.add_argument("--patience", type=float, default=chats.TIMEOUT_S, help="seconds for the replies still to come")
    group.add_argument("--max-prompt", type=int, default=2000, help="tokens; longer ones of the pattern are cut")
    group.add_argument("--max-output", type=int, default=200, help="tokens; likewise")
    group.add_argument("--pictures", type=float, default=0.1, help="share of the chats that are about a picture")
    group.add_argument("--batch", type=int, default=20, help="requests of a batch; 0: no batches")
    group.add_argument("--targets", default=str(measures.TARGETS), help="file of the targets")
    group.add_argument("--measures", default="", help="JSON file for what has been measured")


def _options_of(environment: Environment) -> Any:
    return environment.parsed_options


def _arrivals(options: Any) -> list[arrivals.Arrival]:
    bounds = arrivals.Bounds(options.max_prompt, options.max_output)
    match options.pattern:
        case "fixed":
            lengths = {"prompt_tokens": bounds.prompt_tokens // 4, "output_tokens": bounds.output_tokens // 2}
            return arrivals.fixed(options.rate, options.seconds, **lengths)
        case "trace":
            file = arrivals.trace_file()
            if file is None:
                raise SystemExit("The trace is not there: set AIEXPORT_TEST_DATA, or take --pattern synthetic.")
            return arrivals.replayed(file, options.rate, options.seconds, bounds)
        case _:
            return arrivals.synthetic(options.rate, options.seconds, bounds)


class Chats(User):
    """Sends the chats of all tiers."""

    fixed_count = 1
    wait_time = constant(0)

    def on_start(self) -> None:
        options = _options_of(self.environment)
        self._key = options.key
        self._arrivals = _arrivals(options)
        self._models = _models(self.host or "", options.key)
        self._sees = next(iter(_models(self.host or "", options.key, vision=True).values()), None)
        self._pictures = options.pictures if self._sees else 0.0
        self._seeds = itertools.count(1)
        self._open: Counter[str] = Counter()  # chats whose end has not come yet

    @task
    def send(self) -> None:
        draw = random.Random(7)
        tiers, shares = list(self._models), [TIERS[tier] for tier in self._models]
        pool = Pool(MAX_CHATS)
        busy, start = time.process_time(), time.perf_counter()
        for arrival in self._arrivals:
            due = start + arrival.at_s
            gevent.sleep(max(0.0, due - time.perf_counter()))
            tier = draw.choices(tiers, shares)[0]
            tier = PICTURES if draw.random() < self._pictures else tier
            self._open[tier] += 1
            pool.spawn(self._chat, tier, arrival, due)
        pool.join(timeout=_options_of(self.environment).patience)
        for tier, number in self._open.items():
            run.tiers[tier].failures += ["no end in all that time"] * number
        run.busy_s, run.seconds = time.process_time() - busy, time.perf_counter() - start
        assert self.environment.runner is not None
        gevent.spawn(self.environment.runner.quit)  # it waits for the users, of which this is one
        raise StopUser

    def _chat(self, tier: str, arrival: arrivals.Arrival, due: float) -> None:
        try:
            self._ask(tier, arrival, due)
        finally:
            self._open[tier] -= not run.seconds  # past the end it has been counted as a failure

    def _ask(self, tier: str, arrival: arrivals.Arrival, due: float) -> None:
        seed = next(self._seeds)
        content: object = chats.prompt(arrival.prompt_tokens, seed)
        if tier == PICTURES:
            content = chats.with_picture(QUESTION, chats.picture(SIDE, seed))
        body: dict[str, object] = {
            "model": self._sees if tier == PICTURES else self._models[tier],
            "max_tokens": arrival.output_tokens,
            "seed": seed,
            "messages": [{"role": "user", "content": content}],
        }
        sample = run.tiers[tier]
        try:
            chat = chats.stream(self.host or "", self._key, body)
        except chats.ChatFailed as failed:
            sample.failures.append(str(failed))
            self._tell(tier, "end", 0.0, 0, failed)
            return
        if chat.first_token:
            sample.first_token.append((chat.first_token - due) * 1000)
            self._tell(tier, "first token", sample.first_token[-1], 0, None)
        sample.gap += [gap * 1000 for gap in chat.gaps]
        sample.end_to_end.append((chat.ended - due) * 1000)
        sample.output_tokens += chat.output_tokens
        self._tell(tier, "end", sample.end_to_end[-1], chat.output_tokens, None)

    def _tell(self, tier: str, name: str, milliseconds: float, length: int, failed: Exception | None) -> None:
        """For locust's own report."""
        self.environment.events.request.fire(
            request_type=tier,
            name=name,
            response_time=milliseconds,
            response_length=length,
            exception=failed,
            context={},
        )


class Batches(FastHttpUser):
    """Keeps one batch running, below the chats' class of service."""

    fixed_count = 1
    wait_time = constant(0.5)

    def on_start(self) -> None:
        options = _options_of(self.environment)
        self._size: int = options.batch
        self._headers = {"X-API-Key": options.key}
        self._model = next(iter(_models(self.host or "", options.key).values()))
        self._id = ""
        self._sent_at = 0.0
        self._number = 0

    @task
    def follow(self) -> None:
        if not self._size:
            return
        if self._id:
            self._look()
        else:
            self._send()

    def _send(self) -> None:
        self._number += 1
        requests = [
            {
                "custom_id": f"{self._number}-{index}",
                "model": self._model,
                "max_tokens": BATCH_TOKENS,
                "messages": [{"role": "user", "content": chats.prompt(40, index)}],
            }
            for index in range(self._size)
        ]
        reply = self.client.post(
            "/v2/batch", json={"requests": requests}, headers=self._headers, name="batch: accepted"
        )
        if reply.status_code == 202:
            self._id, self._sent_at = reply.json()["id"], time.perf_counter()
        else:
            run.tiers["batch"].failures.append(f"status {reply.status_code}")

    def _look(self) -> None:
        reply = self.client.get(f"/v2/batch/{self._id}", headers=self._headers, name="batch: status")
        if reply.status_code != 200 or reply.json()["status"] not in ("completed", "canceled", "expired"):
            return
        counts = reply.json()["request_counts"]
        sample = run.tiers["batch"]
        if counts["succeeded"] == counts["total"]:
            sample.end_to_end.append((time.perf_counter() - self._sent_at) * 1000)
            self.environment.events.request.fire(
                request_type="batch", name="end", response_time=sample.end_to_end[-1], response_length=0, context={}
            )
        else:
            sample.failures.append(f"{counts['total'] - counts['succeeded']} of {counts['total']} did not succeed")
        self._id = ""


def _models(host: str, key: str, *, vision: bool = False) -> dict[str, str]:
    """A model of each tier that the server lists; with `vision` one that sees."""
    import urllib.request

    asked = urllib.request.Request(f"{host}/v2/models?limit=100", headers={"X-API-Key": key})
    with urllib.request.urlopen(asked, timeout=chats.TIMEOUT_S) as reply:
        listed = json.load(reply)["data"]
    able = [model for model in listed if model["vision"] or not vision]
    return {tier: model["id"] for tier in TIERS for model in able if model["family"] == tier}


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    def beat() -> None:
        while True:
            before = time.perf_counter()
            gevent.sleep(BEAT_S)
            run.lag_ms.append((time.perf_counter() - before - BEAT_S) * 1000)

    gevent.spawn(beat)


@events.quitting.add_listener
def _judge(environment: Environment, **_: Any) -> None:
    options = _options_of(environment)
    try:
        targets = measures.read_targets(Path(options.targets))
    except measures.TargetsError as error:
        print(error, file=sys.stderr)
        environment.process_exit_code = 2
        return
    asked = {tier: sample for tier, sample in run.tiers.items() if sample.requests}
    verdicts = measures.judge(targets, asked, run.lag_ms)
    environment.process_exit_code = int(not asked or not all(verdict.met for verdict in verdicts))
    if options.measures:
        document = measures.document(asked, verdicts, run.lag_ms)
        document["seconds"] = round(run.seconds, 2)
        document["client_cpu_share"] = round(run.busy_s / run.seconds, 3) if run.seconds else None
        Path(options.measures).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\n{measures.table(verdicts)}")
