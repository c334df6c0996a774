"""Shim workers as processes of their own, as `serve` starts them, in front of a scripted engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import text as sql
from support.scripted_engine import ScriptedEngine
from support.shim_server import until

from aiexport_edge.shim.store import Store, open_store


@dataclass
class Worker:
    """One process. `base_url` is its own listener, where it has one; `lines` is what it has logged."""

    process: subprocess.Popen[str]
    base_url: str
    lines: list[str] = field(default_factory=list)


class Workers:
    """Shim workers that share two listening sockets and a state directory. The workspace `acme` is on Enterprise.

    Each logs JSON, which the test reads from `process.communicate()`, or from `Worker.lines` after `start_apart`.
    """

    def __init__(
        self,
        state: Path,
        engine: ScriptedEngine,
        *,
        config: str = "",
        log_level: str = "info",
        admin_host: str = "127.0.0.1",
    ) -> None:
        self.state, self.engine = state, engine
        self.store: Store = open_store(f"sqlite:///{state / 'store.db'}")
        self.store.create_workspace("acme", "enterprise")
        self.key = self.store.create_key("acme").key
        self.sockets = [_listener(), _listener(admin_host)]
        self.base_url, self.admin_url = (_url(s) for s in self.sockets)
        self.processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self.config = state.parent / "config.toml"
        telemetry = f'[telemetry]\nlog_format = "json"\nlog_level = "{log_level}"\n'
        self.config.write_text(f'[shim]\ndrain = "3s"\n{telemetry}{config}')

    def start(self) -> subprocess.Popen[str]:
        """On the shared sockets."""
        return self._start(self.sockets[0], {})

    def start_apart(self, environ: Mapping[str, str] | None = None) -> Worker:
        """On a REST socket of its own, so that a test knows which process answers; the admin socket is shared."""
        listener = _listener()
        self.sockets.append(listener)
        worker = Worker(self._start(listener, environ or {}), _url(listener))
        reader = threading.Thread(target=_collect, args=(worker,), daemon=True)
        reader.start()
        self._readers.append(reader)
        return worker

    def _start(self, listener: socket.socket, environ: Mapping[str, str]) -> subprocess.Popen[str]:
        fds = [listener.fileno(), self.sockets[1].fileno()]
        places = ["--config", str(self.config), "--state", str(self.state), "--engine", self.engine.address]
        command = [sys.executable, "-m", "aiexport_edge.shim.server", *places]
        command += ["--fd", str(fds[0]), "--admin-fd", str(fds[1])]
        process = subprocess.Popen(
            command, pass_fds=fds, stderr=subprocess.PIPE, text=True, env={**os.environ, **environ}
        )
        self.processes.append(process)
        return process

    def wait_ready(self, base_url: str | None = None) -> None:
        ready = f"{base_url or self.base_url}/readyz"
        until(lambda: httpx.get(ready, timeout=60).status_code == 200, "a worker is ready")

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, headers={"X-API-Key": self.key}, timeout=60)

    def statuses(self) -> list[Any]:
        with self.store.database.connect() as connection:
            return list(connection.execute(sql("SELECT status FROM usage ORDER BY created_at")).scalars())

    def stop(self) -> None:
        """SIGTERM to all; waits until each has written its last line."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(60)
        for reader in self._readers:
            reader.join(60)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(60)
        for process in self.processes:
            if process.stderr is not None:
                process.stderr.close()
        for each in self.sockets:
            each.close()
        self.store.close()


def _listener(host: str = "127.0.0.1") -> socket.socket:
    return socket.create_server((host, 0), backlog=1024)


def _url(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def _collect(worker: Worker) -> None:
    assert worker.process.stderr is not None
    for line in worker.process.stderr:
        worker.lines.append(line)
