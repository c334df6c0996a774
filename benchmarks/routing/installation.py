"""Engines as processes of their own at unix sockets, and `aiexport-edge shim` in front of them, for one policy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

START_S = 400.0  # vLLM takes minutes on a processor
STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Installation:
    """`engines` are addresses, in the order of their configurations."""

    url: str
    admin_url: str
    key: str
    engines: tuple[str, ...]

    def metric(self, name: str, **labels: str) -> float:
        """A number of the shim's."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = httpx.get(f"{self.admin_url}/metrics", timeout=30).text.splitlines()
        found = [line for line in lines if line.startswith(f"{name}{{" if labels else f"{name} ")]
        return sum(float(line.rpartition(" ")[2]) for line in found if all(each in line for each in wanted))


@contextmanager
def running(folder: Path, configs: Sequence[str], policy: str, models: str = "") -> Iterator[Installation]:
    """`configs` are the engines' configuration files, `models` is the shim's part of one; ends with all stopped."""
    folder.mkdir()
    with ExitStack() as stack:
        addresses = tuple(_engine(stack, folder, f"e{index}", text) for index, text in enumerate(configs))
        port, admin_port = _free_port(), _free_port()
        file = folder / "shim.toml"
        listed = ", ".join(f'"{address}"' for address in addresses)
        file.write_text(f'[shim]\nport = {port}\nrouting = "{policy}"\nengines = [{listed}]\n{models}')
        places = ["--config", str(file), "--state", str(folder / "state")]
        _cli("workspaces", "create", "bench", "--plan", "enterprise", *places)
        key = str(_cli("keys", "create", "--workspace", "bench", *places)["key"])
        _spawn(stack, folder / "shim.log", [*CLI, "shim", *places, "--admin-port", str(admin_port)])
        url = f"http://127.0.0.1:{port}"
        _until_serving(url, len(addresses), folder)
        yield Installation(url, f"http://127.0.0.1:{admin_port}", key, addresses)


CLI = [sys.executable, "-m", "aiexport_edge.shim.cli.main"]


def _engine(stack: ExitStack, folder: Path, name: str, config: str) -> str:
    file = folder / f"{name}.toml"
    file.write_text(config)
    address = f"unix:{folder / name}.sock"
    command = [sys.executable, "-m", "aiexport_edge.engine", "--config", str(file)]
    _spawn(stack, folder / f"{name}.log", [*command, "--state", str(folder / f"{name}-state"), "--listen", address])
    return address


def _spawn(stack: ExitStack, log: Path, command: list[str]) -> None:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=log.parent, start_new_session=True, env=dict(os.environ)
        )

    def stop() -> None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    stack.callback(stop)


def _cli(*words: str) -> Any:
    done = subprocess.run([*CLI, *words, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def _until_serving(url: str, number: int, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            status = httpx.get(f"{url}/status", headers={"Accept": "application/json"}, timeout=10).json()
            ready = all(model["state"] == "ready" for model in status["models"])
            if ready and status["engines"]["serving"] == number:
                return
            if any(model["state"] == "failed" for model in status["models"]):
                break
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    logs = "".join(f"\n{log.name}: {log.read_text()[-600:]}" for log in sorted(folder.glob("*.log")))
    raise RuntimeError(f"not all engines serve:{logs}")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
