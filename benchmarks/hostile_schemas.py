"""Schemas made to be expensive, and what others' streams notice: `python -m benchmarks.hostile_schemas`.

A whole installation with the demo model. A few streams write text all the while, one reply after the other; beside them
as many senders again ask for short JSON replies, one after the other: first with an ordinary schema, then with schemas
of one hostile kind, each of them new, so that no cache has it. What compares is the gap between two pieces of an
unhurt stream's text: with ordinary JSON beside it, and with hostile JSON. Kinds that are refused cost their refusal
alone; those that are taken cost masks and a document's state in every step. Prints a table and one JSON document; exit
status 1 where the gaps of a kind are stretched (p99) past `--limit` times those of the ordinary schema, or a hostile
request was answered by anything but 200, 400 and 429.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import select
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.overhead import client
from benchmarks.overhead.processes import machine, write
from benchmarks.quick import server

TEXT_MODEL, JSON_MODEL = "apex-haiku-4-20250401", "apex-sonnet-4-20250501"
TEXT_TOKENS, JSON_TOKENS = 400, 120
ALLOWED = frozenset({200, 400, 429})
SETTLE_S = 1.0  # of a window, not counted: what went before it ends
_DELTA = b"content_block_delta\n"
_END = b"0\r\n\r\n"

Schema = dict[str, Any]


# ---------------------------------------------------------------------------------------------- schemas


def _object(**members: Any) -> Schema:
    return {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}


def ordinary(number: int) -> Schema:
    return _object(name={"type": "string", "maxLength": 30}, **{f"age{number}": {"type": "integer"}})


def _nested(number: int, depth: int) -> Schema:
    schema: Schema = _object(**{f"leaf{number}": {"type": "integer"}})
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema, "b": {"enum": [1, 2]}}, "required": ["a"]}
    return schema


def _enum(number: int, size: int) -> Schema:
    return _object(e={"enum": [f"value {number} {index:05}" for index in range(size)]})


def _members(number: int, size: int) -> Schema:
    return {"type": "object", "properties": {f"m{number}-{index}": {"type": "integer"} for index in range(size)}}


def _pattern(pattern: str) -> Callable[[int], Schema]:
    return lambda number: _object(**{f"text{number}": {"type": "string", "pattern": pattern}})


def _recursion(number: int, size: int) -> Schema:
    """Definitions each of which may be any of the others in three places."""
    names = [f"d{number}-{index}" for index in range(size)]
    every = {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in names]}
    defs = {
        name: {"type": "object", "properties": {"kind": {"const": name}, "a": every, "b": every, "c": every}}
        for name in names
    }
    return {"$defs": defs, "type": "object", "properties": {"root": every}, "required": ["root"]}


def _doubling(number: int, union: str, depth: int) -> Schema:
    """A chain of references, each taken twice: 2^depth paths."""
    defs: Schema = {f"d{depth}": _object(**{f"x{number}": {"type": "integer"}})}
    for index in range(depth):
        defs[f"d{index}"] = {union: [{"$ref": f"#/$defs/d{index + 1}"}] * 2}
    return {"$defs": defs, "$ref": "#/$defs/d0"}


def _alike(number: int, size: int) -> Schema:
    """Options that all begin alike: each stays possible for as long as the text is."""
    options = [
        _object(text={"type": "string", "maxLength": 200}, **{f"only{number}-{index}": {"type": "integer"}})
        for index in range(size)
    ]
    return {"type": "object", "properties": {"any": {"anyOf": options}}, "required": ["any"]}


KINDS: dict[str, Callable[[int], Schema]] = {
    "20 levels deep": lambda number: _nested(number, 20),
    "50 levels deep": lambda number: _nested(number, 50),
    "90 levels deep": lambda number: _nested(number, 90),
    "an enum of 300": lambda number: _enum(number, 300),
    "an enum of 3,000": lambda number: _enum(number, 3000),
    "100 optional members": lambda number: _members(number, 100),
    "1,000 optional members": lambda number: _members(number, 1000),
    "nested stars": _pattern("^((a*)*b*)*c$"),
    "alternatives that overlap": _pattern("^((a|aa|aaa|ab|aba|b|bb|ba)+(a|ab|b)?)+$"),
    "counted repetition": _pattern("^(a{0,400}b{0,400}){1,3}$"),
    "counts of any character": _pattern("^(.{0,900}x){1,3}$"),
    "powers of repetition": _pattern("^((a{0,1000}){0,1000}){0,1000}$"),
    "a pattern that counts back": _pattern(".*a.{0,12}b"),
    "recursion, 6 definitions": lambda number: _recursion(number, 6),
    "recursion, 24 definitions": lambda number: _recursion(number, 24),
    "anyOf twice, 50 deep": lambda number: _doubling(number, "anyOf", 50),
    "allOf twice, 50 deep": lambda number: _doubling(number, "allOf", 50),
    "8 options alike": lambda number: _alike(number, 8),
    "40 options alike": lambda number: _alike(number, 40),
    "arrays of 2,000 in arrays": lambda number: _object(
        **{f"a{number}": {"type": "array", "minItems": 2000, "items": {"type": "array", "minItems": 2000}}}
    ),
    "bounds of numbers": lambda number: _object(
        **{f"n{index}": {"type": "number", "minimum": number + 0.000001, "maximum": 99999.999999} for index in range(9)}
    ),
    "64 KiB and more": lambda number: _object(a={"type": "integer", "title": f"{number}" + "x" * 70_000}),
}


# ---------------------------------------------------------------------------------------------- the senders' process


def send(base: str, key: str, kind: str, num_senders: int, first: int) -> None:
    """Asks until stdin is closed; then prints how requests were answered, and how long that took."""
    os.nice(10)  # what makes the schemas is no part of what is measured
    make = KINDS.get(kind, ordinary)
    numbers = itertools.count(first)
    statuses: Counter[int] = Counter()
    refusals: Counter[str] = Counter()
    times: list[float] = []
    over = threading.Event()

    def one_after_the_other() -> None:
        place = urlsplit(base)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=120)
        while not over.is_set():
            format_ = {"type": "json_schema", "json_schema": {"name": "s", "schema": make(next(numbers))}}
            body = {
                "model": JSON_MODEL,
                "max_tokens": JSON_TOKENS,
                "messages": [{"role": "user", "content": "Tell me of a person."}],
                "response_format": format_,
            }
            started = time.perf_counter()
            connection.request("POST", "/v2/messages", json.dumps(body), {"X-API-Key": key})
            reply = connection.getresponse()
            answer = json.loads(reply.read())
            times.append(time.perf_counter() - started)
            statuses[reply.status] += 1
            if reply.status != 200:
                refusals[str(answer["error"]["message"])[:120]] += 1
                time.sleep(0.02)  # a client that asks on at once is another benchmark

    threads = [threading.Thread(target=one_after_the_other) for _ in range(num_senders)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    over.set()
    for thread in threads:
        thread.join()
    told = {
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "refusal": refusals.most_common(1)[0][0] if refusals else None,
        "answer_p50_ms": round(statistics.median(times) * 1000, 1),
        "next": next(numbers),
    }
    print(json.dumps(told))


# ---------------------------------------------------------------------------------------------- the unhurt streams


@dataclass
class Window:
    """Gaps in seconds between two pieces of text of one reply, of all streams."""

    gaps: list[float] = field(default_factory=list)
    replies: int = 0


class Writers:
    """Streams that write, read by one thread as they come."""

    def __init__(self, address: tuple[str, int], key: str, num_streams: int) -> None:
        self._poll = select.epoll()
        self._open = {}
        self._last: dict[int, float] = {}
        self._seen: dict[int, bytes] = {}  # the end of what each reply has brought
        self._sent = _request(key)
        for _ in range(num_streams):
            connection = client.connect(address)
            self._open[connection.fileno()] = connection
            self._poll.register(connection, select.EPOLLIN)
            self._begin(connection.fileno())

    def read_for(self, seconds: float) -> Window:
        window = Window()
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0:
            for number, _ in self._poll.poll(left):
                data = self._open[number].recv(1 << 16)
                now = time.perf_counter()
                if not data:
                    raise SystemExit(f"a stream was cut: {self._seen[number][-300:]!r}")
                self._seen[number] = (self._seen[number] + data)[-2000:]
                if _DELTA in data:
                    last = self._last.get(number)
                    if last is not None:
                        window.gaps.append(now - last)
                    self._last[number] = now
                if self._seen[number].endswith(_END):
                    window.replies += 1
                    self._begin(number)
        return window

    def _begin(self, number: int) -> None:
        self._last.pop(number, None)
        self._seen[number] = b""
        self._open[number].sendall(self._sent)

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()
        self._poll.close()


def _request(key: str) -> bytes:
    messages = [{"role": "user", "content": "Tell me a long story about three bears."}]
    body = json.dumps({"model": TEXT_MODEL, "max_tokens": TEXT_TOKENS, "messages": messages}).encode()
    head = f"POST /v2/messages/stream HTTP/1.1\r\nhost: localhost\r\nx-api-key: {key}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


# ---------------------------------------------------------------------------------------------- measuring


@dataclass
class Kind:
    """What was measured with schemas of one kind beside the streams."""

    gaps: list[list[float]] = field(default_factory=list)  # a round each
    answers: dict[str, Any] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)

    def milliseconds(self, percent: float) -> float:
        """The median over the rounds."""
        return statistics.median(_percentile(gaps, percent) for gaps in self.gaps) * 1000

    @property
    def worst_ms(self) -> float:
        return max(max(gaps) for gaps in self.gaps) * 1000


def _percentile(samples: list[float], percent: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


ALONE, ORDINARY = "nothing beside", "an ordinary schema"


def measure(kinds: list[str], *, streams: int, senders: int, seconds: float, rounds: int) -> dict[str, Kind]:
    """Each kind in turn, `rounds` times, the ordinary schema before and after every few of them."""
    found = {name: Kind() for name in (ALONE, ORDINARY, *kinds)}
    order = [ALONE, *itertools.chain.from_iterable((ORDINARY, *kinds[at : at + 3]) for at in range(0, len(kinds), 3))]
    number = 0
    with server() as running:
        place = urlsplit(running.url)
        writers = Writers((str(place.hostname), int(place.port or 0)), running.key, streams)
        writers.read_for(2 * SETTLE_S)
        for round_, name in itertools.product(range(rounds), order):
            print(f"round {round_ + 1}: {name}", file=sys.stderr, flush=True)
            sending = None
            if name != ALONE:
                command = [sys.executable, "-m", "benchmarks.hostile_schemas", "--send", name, "--key", running.key]
                command += ["--server", running.url, "--senders", str(senders), "--first", str(number)]
                sending = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            writers.read_for(SETTLE_S)
            found[name].gaps.append(writers.read_for(seconds).gaps)
            if sending is not None:
                told = _end(sending, writers)
                number = told.pop("next")
                found[name].statuses.update({int(key): value for key, value in told.pop("statuses").items()})
                found[name].answers = told
        writers.close()
    return found


def _end(sending: subprocess.Popen[str], writers: Writers) -> dict[str, Any]:
    """Lets the senders have their last answers; the streams are read meanwhile, or they would be given up."""
    assert sending.stdin is not None
    assert sending.stdout is not None
    with suppress(BrokenPipeError):
        sending.stdin.close()
    while sending.poll() is None:
        writers.read_for(0.1)
    if sending.returncode:
        raise SystemExit(f"the senders ended with status {sending.returncode}")
    told: dict[str, Any] = json.loads(sending.stdout.read())
    return told


def rows_of(found: dict[str, Kind]) -> list[dict[str, Any]]:
    ordinary_p99 = found[ORDINARY].milliseconds(99)
    return [
        {
            "kind": name,
            "gaps": sum(map(len, kind.gaps)),
            "gap_p50_ms": round(kind.milliseconds(50), 2),
            "gap_p99_ms": round(kind.milliseconds(99), 2),
            "gap_worst_ms": round(kind.worst_ms, 1),
            "p99_to_ordinary": round(kind.milliseconds(99) / ordinary_p99, 2),
            "statuses": {str(status): number for status, number in sorted(kind.statuses.items())},
            **kind.answers,
        }
        for name, kind in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':<34} {'gap p50':>8} {'p99':>8} {'worst':>8} {'p99 to':>9} {'answers'}"]
    lines += [f"{'':<34} {'ms':>8} {'ms':>8} {'ms':>8} {'ordinary':>9}"]
    for row in rows:
        answers = ", ".join(f"{number} x {status}" for status, number in row["statuses"].items())
        lines.append(
            f"{row['kind']:<34} {row['gap_p50_ms']:>8.2f} {row['gap_p99_ms']:>8.2f} {row['gap_worst_ms']:>8.1f}"
            f" {row['p99_to_ordinary']:>9.2f} {answers}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile_schemas", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--streams", type=int, default=4, help="that write all the while")
    parser.add_argument("--senders", type=int, default=4, help="of schemas, at once")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=2.0, help="times the ordinary schema's p99")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--send", help=argparse.SUPPRESS)
    parser.add_argument("--server", help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send is not None:
        send(options.server, options.key, options.send, options.senders, options.first)
        return 0
    facts = machine()
    found = measure(
        options.kinds,
        streams=options.streams,
        senders=options.senders,
        seconds=options.seconds,
        rounds=options.rounds,
    )
    rows = rows_of(found)
    print(table(rows))
    document = {"machine": facts | {"load_average_after": round(os.getloadavg()[0], 2)}, "rows": rows}
    if options.output:
        write(options.output, document)
    stretched = [row["kind"] for row in rows if row["p99_to_ordinary"] > options.limit]
    wrong = [row["kind"] for row in rows if not ALLOWED.issuperset(map(int, row["statuses"]))]
    for kind in stretched:
        print(f"{kind}: the gaps of others are stretched")
    for kind in wrong:
        print(f"{kind}: answered by something else than 200, 400 and 429")
    return int(bool(stretched or wrong))


if __name__ == "__main__":
    sys.exit(main())
