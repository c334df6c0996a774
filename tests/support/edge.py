"""Whole installations as real processes: `aiexport-edge serve` on ports of its own, and a streaming client."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from aiexport_edge.proto import engine_pb2, engine_pb2_grpc
from aiexport_edge.proto.config import source_directory

VLLM_PYTHON = "AIEXPORT_TEST_VLLM_PYTHON"  # of the environment: the interpreter of an installation of vLLM
BACKENDS = ("native", "vllm") if os.environ.get(VLLM_PYTHON) else ("native",)  # what the conformance tests run on
KEY = re.compile(r"axp_live_[A-Za-z0-9_-]{43}")
HAIKU = "apex-haiku-4-20250401"
SONNET = "apex-sonnet-4-20250501"


def free_port() -> int:
    """A port of loopback that nobody listens on just now, nor on the next, which is the admin listener's by default.

    Not of those that the system gives to outgoing connections: between this look and a server's start, a busy machine
    could give it away.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        try:
            with socket.socket() as first, socket.socket() as second:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 1))
        except OSError:
            continue
        return port


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Polls until `condition` holds; fails naming `what` when it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)


@dataclass
class Edge:
    """A running installation. `key` is the demo workspace's; `stdout` and `stderr` hold what it has printed.

    `ca` is the certificate that its REST listener shows, where it has TLS.
    """

    process: subprocess.Popen[str]
    port: int
    admin_port: int
    state: Path
    config: Path | None
    key: str = ""
    ca: Path | None = None
    backend: str = "native"
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)

    @property
    def base_url(self) -> str:
        return f"{'https' if self.ca else 'http'}://127.0.0.1:{self.port}"

    def client(self, **kwargs: Any) -> httpx.Client:
        headers = {"X-API-Key": self.key}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=120, verify=self._verify(), **kwargs)

    def async_client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.base_url, headers={"X-API-Key": self.key}, timeout=120, limits=limits)

    def cli(self, *args: str) -> Any:
        """Runs one command against this installation with --json and returns its document."""
        command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", *args, "--state", str(self.state), "--json"]
        if self.config:
            command += ["--config", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def stats(self) -> engine_pb2.StatsResponse:
        with grpc.insecure_channel(f"unix:{self.state / 'engine.sock'}") as channel:
            reply: engine_pb2.StatsResponse = engine_pb2_grpc.EngineStub(channel).Stats(
                engine_pb2.StatsRequest(), timeout=120, wait_for_ready=True
            )
            return reply

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.base_url}/readyz", timeout=5, verify=self._verify()).status_code == 200
        except httpx.HTTPError:
            return False

    def _verify(self) -> ssl.SSLContext | bool:
        return ssl.create_default_context(cafile=self.ca) if self.ca else True

    def stop(self) -> int:
        """SIGTERM and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def start(state: Path, config: Path | None = None, *args: str, ca: Path | None = None) -> Edge:
    """Starts `serve` and waits until it is ready."""
    edge = _run(state, config, args, ca)
    if config is None:
        wait_until(lambda: KEY.search("".join(edge.stdout)) is not None, "serve prints the demo key")
        found = KEY.search("".join(edge.stdout))
        assert found is not None
        edge.key = found.group()
    else:
        edge.cli("workspaces", "create", "tests", "--plan", "enterprise")
        edge.key = edge.cli("keys", "create", "--workspace", "tests")["key"]
    return edge


def start_on(backend: str, directory: Path) -> Edge:
    """The demo installation with its three tiers, on a backend; its workspace is `demo`."""
    if backend == "native":
        return start(directory / "state")
    from support.text_model import text_only  # brings torch

    source = text_only(source_directory("demo"), directory / "demo")
    config = directory / "aiexport-edge.toml"
    tiers = [_VLLM_TIER.format(*tier, source=source, python=os.environ[VLLM_PYTHON]) for tier in _TIERS]
    config.write_text("".join(tiers))
    edge = _run(directory / "state", config, (), None, ready_s=600)
    edge.backend = backend
    edge.cli("workspaces", "create", "demo", "--plan", "enterprise")
    edge.key = edge.cli("keys", "create", "--workspace", "demo")["key"]
    return edge


_TIERS = (
    ("apex-opus-3-20250401", "opus", "Apex Opus 3", 15.0, 75.0),
    (SONNET, "sonnet", "Apex Sonnet 4", 3.0, 15.0),
    (HAIKU, "haiku", "Apex Haiku 4", 0.25, 1.25),
)
_VLLM_TIER = """\
[[models]]
ids = ["{0}"]
family = "{1}"
display_name = "{2}"
source = "{source}"
backend = "vllm"
input_per_million = {3}
output_per_million = {4}
[models.vllm]
python = "{python}"
memory_share = 0.3
kv_cache_bytes = "512MiB"
"""


def restart(edge: Edge) -> Edge:
    """Starts `serve` again on the state of an installation that has ended, with its key."""
    again = _run(edge.state, edge.config, (), edge.ca)
    again.key = edge.key
    return again


class _PortTaken(Exception):
    """Somebody was faster."""


def _run(state: Path, config: Path | None, args: tuple[str, ...], ca: Path | None, *, ready_s: float = 180.0) -> Edge:
    while True:
        try:
            return _run_once(state, config, args, ca, ready_s)
        except _PortTaken:
            continue


def _run_once(state: Path, config: Path | None, args: tuple[str, ...], ca: Path | None, ready_s: float) -> Edge:
    port, admin_port = free_port(), free_port()
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "serve", "--state", str(state)]
    command += ["--port", str(port), "--admin-port", str(admin_port), *args]
    if config:
        command += ["--config", str(config)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=state.parent, env=dict(os.environ)
    )
    edge = Edge(process, port, admin_port, state, config, ca=ca)

    def collect(stream: Any, lines: list[str]) -> None:
        with stream:
            for line in stream:
                lines.append(line)

    readers = [
        threading.Thread(target=collect, args=streamed, daemon=True)
        for streamed in ((process.stdout, edge.stdout), (process.stderr, edge.stderr))
    ]
    for reader in readers:
        reader.start()

    def up() -> bool:
        if process.poll() is not None:
            for reader in readers:
                reader.join()
            if any("is taken by another program" in line for line in edge.stderr):
                raise _PortTaken
            pytest.fail(f"serve ended with {process.returncode}: {''.join(edge.stderr[-30:])}")
        return edge.ready()

    try:
        wait_until(up, "serve is ready", ready_s)
    except BaseException:
        process.kill()
        print("".join(edge.stderr[-30:]))
        raise
    return edge


@dataclass
class Reply:
    """A streamed reply, folded."""

    text: str = ""
    stop_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    status: int = 200


def fold(reply: Reply, event: dict[str, Any]) -> None:
    """Adds one SSE event's JSON to a reply."""
    kind = event["type"]
    reply.events.append(kind)
    if kind == "message_start":
        reply.usage.update(event["message"]["usage"])
    elif kind == "content_block_delta":
        reply.text += event["delta"]["text"]
    elif kind == "message_delta":
        reply.stop_reason = event["delta"]["stop_reason"]
        reply.usage.update(event["usage"])
    elif kind == "error":
        reply.error = event["error"]


async def stream(client: httpx.AsyncClient, body: dict[str, Any], *, leave_after: int = 0) -> Reply:
    """Streams one message; with `leave_after`, closes the connection after that many deltas."""
    reply = Reply()
    deltas = 0
    async with client.stream("POST", "/v2/messages/stream", json=body) as response:
        reply.status = response.status_code
        if response.status_code != 200:
            reply.error = json.loads(await response.aread())["error"]
            return reply
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                fold(reply, json.loads(line[5:]))
                deltas += reply.events[-1] == "content_block_delta"
                if leave_after and deltas >= leave_after:
                    return reply
    return reply


def message(text: str, **fields: Any) -> dict[str, Any]:
    """A messages body with one user turn."""
    return {"model": HAIKU, "max_tokens": 64, "messages": [{"role": "user", "content": text}], **fields}
