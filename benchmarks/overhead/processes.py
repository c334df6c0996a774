"""Starts what is measured, as processes of their own, and reads what they have cost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiexport_edge.engine.text.tokenizer import Tokenizer
from aiexport_edge.proto import config as configuration
from aiexport_edge.shim.store import open_store

READY_S = 60.0


def cpu_s(pid: int) -> float:
    """Seconds of processor time that all threads of a process have had: its clock, as clock_getcpuclockid(3) names
    it, which counts in nanoseconds where getrusage and /proc count in ticks.
    """
    return time.clock_gettime((~pid << 3) | 2)


def token_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of whole words with a blank before them: each is one event's text by itself."""
    ids = []
    for token_id in range(256, 1 << 14):
        word = tokenizer.decode_bytes(token_id)
        if word[:1] == b" " and word[1:].isalpha() and word.isascii():
            ids.append(token_id)
    return ids


@dataclass(frozen=True, slots=True)
class Stack:
    """A running installation over the fake core. `reports` hears of aborts."""

    address: tuple[str, int]
    key: str
    shim: int
    engine: int
    reports: socket.socket


@contextmanager
def stack(*, through: str = "") -> Iterator[Stack]:
    """One engine process and one shim worker, ready; begun by `python -m THROUGH --run MODULE`, where that is given."""
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "aiexport-edge.toml"
        file.write_text("", encoding="utf-8")
        config = configuration.load(file, folder / "state")
        directory = configuration.source_directory("demo")
        (folder / "ids").write_text("\n".join(map(str, token_ids(Tokenizer.load(directory)))), encoding="utf-8")
        reports = cleanup.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        reports.bind(str(folder / "reports"))
        store = open_store(config.store.url)
        store.create_workspace("overhead", "enterprise")
        key = store.create_key("overhead").key
        store.close()
        engine_address = f"unix:{folder / 'engine.sock'}"
        engine = cleanup.enter_context(
            process(
                *_command("benchmarks.overhead.engine", through),
                *("--listen", engine_address, "--directory", directory),
                *("--ids", folder / "ids", "--reports", folder / "reports"),
                log=folder / "engine.log",
            )
        )
        listener = cleanup.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2048))
        shim = cleanup.enter_context(
            process(
                *_command("aiexport_edge.shim.server", through),
                *("--config", file, "--state", folder / "state"),
                *("--fd", listener.fileno(), "--engine", engine_address),
                fds=(listener.fileno(),),
                log=folder / "shim.log",
            )
        )
        address = listener.getsockname()
        try:
            wait_until_ready(f"http://{address[0]}:{address[1]}/readyz")
        except TimeoutError:
            logs = (folder / "engine.log").read_text() + (folder / "shim.log").read_text()
            raise SystemExit(f"the stack did not start:\n{logs}") from None
        yield Stack((address[0], address[1]), key, shim.pid, engine.pid, reports)


def _command(module: str, through: str) -> tuple[str, ...]:
    return (through, "--run", module) if through else (module,)


@contextmanager
def process(module: str, *arguments: object, fds: tuple[int, ...] = (), log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m module`, killed at the end."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with log.open("wb") as output:
        running = subprocess.Popen(command, pass_fds=fds, stdout=output, stderr=output)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def wait_until_ready(url: str) -> None:
    """Raises `TimeoutError`."""
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                if reply.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.05)
    raise TimeoutError(url)


def machine() -> dict[str, object]:
    """Processor, cores, load, versions, commit."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    packages = ("grpcio", "protobuf", "msgspec", "starlette", "uvicorn", "uvloop", "httptools")
    return {
        "processor": names[0] if names else "",
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": sys.version.split()[0],
        "commit": commit.stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {package: version(package) for package in packages},
    }


def write(file: Path, document: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
