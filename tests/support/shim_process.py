"""Shim workers as real processes, each with a listening socket of its own, on one state directory and one store."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import httpx
from support.shim_server import until


class ShimProcess:
    """One worker. `base_url` answers from `start` to its end; what it writes to stderr is in `log`."""

    def __init__(self, state: Path, config: Path, engine: str, name: str = "worker") -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.base_url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._log = state.parent / f"{name}.log"
        fd = self._socket.fileno()
        places = ["--config", str(config), "--state", str(state), "--engine", engine, "--fd", str(fd)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aiexport_edge.shim.server", *places], pass_fds=[fd], stderr=log
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log
            try:
                return httpx.get(f"{self.base_url}/readyz", timeout=60).status_code == 200
            except httpx.HTTPError:
                return False

        until(ready, "the worker is ready", 60)

    def kill(self) -> None:
        """SIGKILL; connections break."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._socket.close()
