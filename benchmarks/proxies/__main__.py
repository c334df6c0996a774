"""Requests a second, what a request waits longer for the proxy, memory: this stack and LiteLLM's proxy, in one run.

    python -m benchmarks.proxies [--litellm DIR] [--seconds S] [--output FILE]

Each stands in front of something that answers at once: LiteLLM in front of an OpenAI-compatible server (`upstream.py`),
this stack's shim and engine in front of a core (`benchmarks/overhead/core.py`). One worker process of each serves HTTP.
Ours also renders the chat template, tokenizes, puts tokens back into text and commits each request's usage to its store
before it answers; LiteLLM runs without a database, so it keeps nothing. DIR is a virtual environment with
`litellm[proxy]`; without it one is made in a temporary directory.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.overhead import client
from benchmarks.overhead.processes import cpu_s, machine, process, stack, wait_until_ready, write

RESULTS = Path(__file__).resolve().parents[1] / "results"
NUM_TOKENS = 4  # of a whole reply
STREAM_TOKENS = 200
NUM_STREAMS = 16
_PSS = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Served:
    """Something that answers, and the processes that are its cost. `whole` and `streamed`: requests to send it."""

    name: str
    address: tuple[str, int]
    pids: tuple[int, ...]
    whole: bytes
    streamed: bytes
    stream_end: bytes


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one. Times in milliseconds, memory in MiB (shared pages by halves: PSS)."""

    name: str
    alone_p50: float
    alone_p99: float
    requests_per_s: float
    loaded_p50: float
    loaded_p99: float
    cpu_ms_per_request: float
    cpu_us_per_streamed_token: float
    memory_mib: float


def measure(served: Served, seconds: float) -> Figures:
    """One connection, then sixteen, then sixteen streams."""
    client.unary(served.address, served.whole, num_connections=4, seconds=1.0)
    _, alone = client.unary(served.address, served.whole, num_connections=1, seconds=seconds)
    before, start = _cost(served), time.monotonic()
    count, loaded = client.unary(served.address, served.whole, num_connections=16, seconds=seconds)
    took, cost = time.monotonic() - start, _cost(served) - before
    before = _cost(served)
    _stream_all(served)
    streaming = _cost(served) - before
    return Figures(
        name=served.name,
        alone_p50=round(statistics.median(alone) * 1000, 2),
        alone_p99=round(_p99(alone) * 1000, 2),
        requests_per_s=round(count / took, 1),
        loaded_p50=round(statistics.median(loaded) * 1000, 2),
        loaded_p99=round(_p99(loaded) * 1000, 2),
        cpu_ms_per_request=round(cost * 1000 / count, 2),
        cpu_us_per_streamed_token=round(streaming * 1e6 / (NUM_STREAMS * STREAM_TOKENS), 1),
        memory_mib=round(sum(_memory_mib(pid) for pid in served.pids), 1),
    )


def _cost(served: Served) -> float:
    return sum(map(cpu_s, served.pids))


def _p99(times: list[float]) -> float:
    return sorted(times)[len(times) * 99 // 100]


def _memory_mib(pid: int) -> float:
    return int(_PSS.findall(Path(f"/proc/{pid}/smaps_rollup").read_text())[0]) / 1024


def _stream_all(served: Served) -> None:
    """All streams at once, each read to its end. Raises `EOFError` where one is cut."""
    poll = select.epoll()
    open_streams, tails = {}, {}
    for _ in range(NUM_STREAMS):
        connection = client.connect(served.address)
        connection.sendall(served.streamed)
        open_streams[connection.fileno()], tails[connection.fileno()] = connection, b""
        poll.register(connection, select.EPOLLIN)
    while open_streams:
        for number, _ in poll.poll(30):
            data = open_streams[number].recv(1 << 18)
            if not data:
                raise EOFError(f"{served.name}: a stream was cut after {tails[number]!r}")
            tails[number] = (tails[number] + data)[-200:]
            if served.stream_end in tails[number]:
                poll.unregister(number)
                open_streams.pop(number).close()
    poll.close()


def _openai(key: str, *, stream: bool) -> bytes:
    num_tokens = STREAM_TOKENS if stream else NUM_TOKENS
    messages = [{"role": "user", "content": "Tell me a story about three bears."}]
    body = json.dumps({"model": "fake", "max_tokens": num_tokens, "stream": stream, "messages": messages}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextmanager
def upstream(folder: Path) -> Iterator[Served]:
    """The server that answers at once."""
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        fd = listener.fileno()
        with process("benchmarks.proxies.upstream", "--fd", fd, fds=(fd,), log=folder / "upstream.log") as server:
            host, port = listener.getsockname()
            wait_until_ready(f"http://{host}:{port}/")
            requests = _openai("none", stream=False), _openai("none", stream=True)
            yield Served("upstream alone", (host, port), (server.pid,), *requests, b"[DONE]")


@contextmanager
def litellm(environment: Path, behind: Served, folder: Path) -> Iterator[Served]:
    """LiteLLM's proxy in front of it, one worker, with a key and nothing else configured."""
    key = f"sk-{secrets.token_hex(16)}"
    config = {
        "model_list": [
            {
                "model_name": "fake",
                "litellm_params": {
                    "model": "openai/fake",
                    "api_base": f"http://{behind.address[0]}:{behind.address[1]}/v1",
                    "api_key": "none",
                },
            }
        ],
        "general_settings": {"master_key": key},
    }
    file = folder / "litellm.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(environment / "bin" / "litellm"), "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "litellm.log").open("wb") as log:
        server = subprocess.Popen([*command, "--num_workers", "1"], stdout=log, stderr=log, cwd=folder)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health/liveliness")
            requests = _openai(key, stream=False), _openai(key, stream=True)
            yield Served("LiteLLM", ("127.0.0.1", port), (server.pid,), *requests, b"[DONE]")
        finally:
            server.kill()
            server.wait()


@contextmanager
def ours() -> Iterator[Served]:
    """A shim worker and an engine process; the engine counts as ours, as it stands between client and core."""
    with stack() as running:
        whole = client.request(running.key, max_tokens=NUM_TOKENS, stream=False)
        streamed = client.request(running.key, max_tokens=STREAM_TOKENS)
        pids = (running.shim, running.engine)
        yield Served("AI Export Edge", running.address, pids, whole, streamed, b"event: message_stop")


def _install(folder: Path) -> Path:
    print("Installing litellm[proxy] in a temporary environment: some minutes.", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", "litellm[proxy]"], check=True)
    return folder


def _version(environment: Path) -> str:
    code = "from importlib.metadata import version; print(version('litellm'))"
    return subprocess.run(
        [str(environment / "bin" / "python"), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxies", description=__doc__)
    parser.add_argument("--litellm", type=Path, metavar="DIR", help="a virtual environment with litellm[proxy]")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--output", type=Path, default=RESULTS / "proxies.json", metavar="FILE")
    arguments = parser.parse_args()
    facts = machine()
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = arguments.litellm or _install(folder / "environment")
        with ours() as served:
            figures.append(measure(served, arguments.seconds))
        with upstream(folder) as behind:
            figures.append(measure(behind, arguments.seconds))
            with litellm(environment, behind, folder) as served:
                figures.append(measure(served, arguments.seconds))
        facts["litellm"] = _version(environment)
    write(arguments.output, {"machine": facts, "figures": [asdict(each) for each in figures]})
    for each in figures:
        print(f"{each.name}:")
        for field, value in list(asdict(each).items())[1:]:
            print(f"  {field.replace('_', ' '):<28} {value:>10,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
