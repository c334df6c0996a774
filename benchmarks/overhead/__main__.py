"""Measures the stack's own cost: `python -m benchmarks.overhead [--quick] [--output FILE]`.

Real processes and sockets all the way: client → shim worker → engine process → a core that emits tokens at will
(`core.py`). Cost is processor time of each process over a window in which all streams run, so that it says the same on
a machine that does other work too, if less exactly. Each figure stands beside its target and, where there is one, a
floor measured in the same run: the same work with nothing around it (`floors.py`). Takes about two minutes.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop

from aiexport_edge.engine.text.reply import ReplyText
from aiexport_edge.engine.text.tokenizer import Tokenizer
from aiexport_edge.proto import config as configuration
from benchmarks import scheduler
from benchmarks.overhead import client, floors
from benchmarks.overhead.processes import Stack, cpu_s, machine, process, stack, token_ids, wait_until_ready, write

RESULTS = Path(__file__).resolve().parents[1] / "results"
ENDLESS = 1 << 20  # tokens: more than any window sees
FULL = 60_000.0  # tokens/s over 256 streams that a shim process must carry
WARM_S = 1.0
STEP_US = 5000  # between a reply's first token and its second: no core has the end of a reply with its first token
PAUSE_S = 0.02  # between two requests, so that what the first leaves to be done is done


@dataclass(frozen=True, slots=True)
class Row:
    """A figure. `target` is at most that, or at least where `higher_is_better`; None: nothing was promised."""

    name: str
    value: float
    unit: str
    target: float | None = None
    floor: float | None = None
    higher_is_better: bool = False

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.higher_is_better else self.value <= self.target


@dataclass(frozen=True, slots=True)
class Window:
    """What one window of streaming cost, in microseconds of processor time a token."""

    shim_us: float
    engine_us: float
    client_us: float
    tokens_per_s: float
    tokens_per_event: float


def streams(running: Stack, num_streams: int, tokens_per_s: float, seconds: float) -> Window:
    """All streams get a token a step."""
    pace_us = round(num_streams / tokens_per_s * 1e6)
    sent = client.request(running.key, max_tokens=ENDLESS, pace_us=pace_us)
    open_streams = client.Streams(running.address, sent, num_streams)
    try:
        open_streams.read_until_all_run()
        open_streams.read_for(WARM_S)
        counts, costs, start = open_streams.counts.copy(), _costs(running), time.monotonic()
        open_streams.read_for(seconds)
        while open_streams.counts.tokens == counts.tokens:  # a machine that stands still
            open_streams.read_for(seconds)
        took = time.monotonic() - start
        counts = open_streams.counts.since(counts)
        shim, engine, own = (
            (after - before) * 1e6 / counts.tokens for after, before in zip(_costs(running), costs, strict=True)
        )
    finally:
        open_streams.close()
        _quiet(running)
    return Window(shim, engine, own, counts.tokens / took, counts.tokens / counts.events)


def _costs(running: Stack) -> tuple[float, float, float]:
    return cpu_s(running.shim), cpu_s(running.engine), time.process_time()


def _quiet(running: Stack) -> None:
    """Until nothing is told of aborts any more."""
    running.reports.settimeout(0.5)
    try:
        while True:
            running.reports.recv(64)
    except TimeoutError:
        pass


def floor_us(kind: str, num_streams: int, tokens_per_s: float, seconds: float) -> float:
    """Microseconds an event that writing it costs a server of `floors.py` that does nothing else."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        fds = (listener.fileno(),)
        with process("benchmarks.overhead.floors", kind, "--fd", fds[0], fds=fds, log=Path(folder) / "log") as server:
            host, port = listener.getsockname()
            wait_until_ready(f"http://{host}:{port}/readyz")
            pace_us = round(num_streams / tokens_per_s * 1e6)
            sent = f"GET /?streams={num_streams}&pace_us={pace_us} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode()
            open_streams = client.Streams((host, port), sent, num_streams)
            open_streams.read_until_all_run()
            open_streams.read_for(WARM_S)
            before, cost = open_streams.counts.copy(), cpu_s(server.pid)
            open_streams.read_for(seconds)
            cost = cpu_s(server.pid) - cost
            tokens = open_streams.counts.since(before).tokens
            open_streams.close()
    return cost * 1e6 / tokens


def grpc_floor() -> tuple[float, float]:
    """Microseconds a delta: one gRPC stream read and counted, and read and parsed."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"unix:{folder}/floor.sock"
        with process("benchmarks.overhead.floors", "tokens", address, log=Path(folder) / "log"):
            return uvloop.run(floors.count_tokens(address))


def detokenizer_us(num_tokens: int = 200_000) -> float:
    """The tokenizer's own part of a token in the engine process: bytes to text, stop sequences looked for."""
    tokenizer = Tokenizer.load(configuration.source_directory("demo"))
    ids = token_ids(tokenizer)
    text = ReplyText(tokenizer.decode_bytes, strip_space=False, stop_ids=frozenset(), stops=())
    single = [[ids[index % len(ids)]] for index in range(num_tokens)]
    start = time.process_time()
    for each in single:
        text.feed(each)
    return (time.process_time() - start) * 1e6 / num_tokens


def first_tokens_ms(running: Stack, samples: int, prompt_ms: int) -> list[float]:
    """Beyond the core's own `prompt_ms`; on an idle stack, one request after the other on one connection."""
    sent = client.request(running.key, max_tokens=2, prompt_ms=prompt_ms, pace_us=STEP_US)
    times = []
    with client.connect(running.address) as connection:
        for _ in range(samples + 10):
            times.append(client.first_token_s(connection, sent) * 1000 - prompt_ms)
            time.sleep(PAUSE_S)
    return sorted(times[10:])


def aborts_ms(running: Stack, samples: int) -> list[float]:
    """From a client's closing of its connection to the core's reading of the abort."""
    times = []
    running.reports.settimeout(10)
    for _ in range(samples):
        sent = client.request(running.key, max_tokens=ENDLESS, pace_us=5000)
        open_streams = client.Streams(running.address, sent, 1)
        open_streams.read_until_all_run()
        closed = time.monotonic_ns()
        open_streams.close()
        while (heard := int(running.reports.recv(64))) < closed:
            pass  # of an earlier stream
        times.append((heard - closed) / 1e6)
    return sorted(times)


def measure(seconds: float, samples: int) -> list[Row]:
    """All rows, one after the other; says on stderr what it does."""
    rows: list[Row] = []
    read_us, parsed_us = grpc_floor()
    with stack() as running:
        for num_streams, tokens_per_s in ((64, 15_000.0), (256, 15_000.0)):
            _say(f"{num_streams} streams, {tokens_per_s:,.0f} tokens/s")
            writes_us = floor_us("writes", num_streams, tokens_per_s, seconds)
            events_us = floor_us("events", num_streams, tokens_per_s, seconds)
            window = streams(running, num_streams, tokens_per_s, seconds)
            at = f"{num_streams} streams"
            rows += [
                Row(f"shim, {at}", window.shim_us, "µs/token", 10.0, writes_us),
                Row("  beyond the bare writes", window.shim_us - writes_us, "µs/token"),
                Row("  floor: a bare ASGI application", events_us, "µs/token"),
                Row(f"engine process, {at}", window.engine_us, "µs/token", 5.0 + detokenizer_us(), parsed_us),
                Row("  client, for comparison", window.client_us, "µs/token"),
                Row("  tokens an event", window.tokens_per_event, ""),
            ]
        _say(f"256 streams, {FULL:,.0f} tokens/s offered")
        window = streams(running, 256, FULL, seconds)
        rows += [
            Row(f"of {FULL:,.0f} tokens/s, 256 streams", window.tokens_per_s, "tokens/s", 0.99 * FULL, None, True),
            Row("  a shim process, by its cost then", 1e6 / window.shim_us, "tokens/s", FULL, 1e6 / writes_us, True),
            Row("  shim", window.shim_us, "µs/token"),
            Row("  engine process", window.engine_us, "µs/token"),
            Row("  tokens an event", window.tokens_per_event, ""),
        ]
        _say("first tokens, aborts, whole replies")
        for prompt_ms, target_ms in ((20, 3.0), (0, None)):
            firsts = first_tokens_ms(running, samples, prompt_ms)
            rows += [
                Row(f"first token p50, beyond a core's {prompt_ms} ms", statistics.median(firsts), "ms", target_ms),
                Row("  p99", firsts[len(firsts) * 99 // 100], "ms"),
            ]
        aborts = aborts_ms(running, samples // 4)
        rows += [
            Row("abort to core p50", statistics.median(aborts), "ms"),
            Row("abort to core p99", aborts[len(aborts) * 99 // 100], "ms"),
        ]
        sent = client.request(running.key, max_tokens=4, stream=False)
        for num_connections in (1, 16):
            before = _costs(running)
            count, times = client.unary(running.address, sent, num_connections=num_connections, seconds=seconds)
            shim, engine, _ = (after - then for after, then in zip(_costs(running), before, strict=True))
            at = f"{num_connections} at once"
            rows += [
                Row(f"whole replies, {at}", count / seconds, "1/s"),
                Row(f"  p50, {at}", statistics.median(times) * 1000, "ms"),
                Row(f"  shim, {at}", shim * 1e3 / count, "ms/request"),
                Row(f"  engine process, {at}", engine * 1e3 / count, "ms/request"),
            ]
    rows += [
        Row("detokenizer alone", detokenizer_us(), "µs/token"),
        Row("floor: gRPC stream, counted", read_us, "µs/token"),
        Row("floor: gRPC stream, parsed", parsed_us, "µs/token"),
    ]
    for num_running, target_us in ((1, 150.0), (256, 1000.0)):
        step = scheduler.measure(num_running, 300)
        rows.append(Row(f"scheduler and commit, {num_running} running", step["step_us"], "µs/step", target_us))
    return rows


def table(rows: list[Row]) -> str:
    """One line a figure: value, target and whether it is met, floor and how many times the floor it is."""
    lines = [f"{'':<42} {'value':>10} {'':<10} {'target':>10} {'':<5} {'floor':>9} {'ratio':>6}"]
    for row in rows:
        target = "" if row.target is None else f"{'≥' if row.higher_is_better else '≤'} {_number(row.target)}"
        met = {None: "", True: "met", False: "NOT"}[row.met]
        floor = "" if row.floor is None else _number(row.floor)
        ratio = "" if row.floor is None else f"{row.value / row.floor:.2f}"
        lines.append(
            f"{row.name:<42} {_number(row.value):>10} {row.unit:<10} {target:>10} {met:<5} {floor:>9} {ratio:>6}"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short windows, to see that it works")
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json", metavar="FILE")
    arguments = parser.parse_args()
    facts = machine()
    rows = measure(1.5, 40) if arguments.quick else measure(5.0, 200)
    document = {"machine": facts, "rows": [asdict(row) | {"met": row.met} for row in rows]}
    write(arguments.output, document)
    print(table(rows))
    print(f"\n{facts['processor']}, {facts['cores']} cores, load {facts['load_average_before']} → {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
