"""Engines as processes of their own, and one shim in front of them: an installation over several machines, on one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
from support.edge import free_port, wait_until

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub
from aiexport_edge.shim.store import open_store


class EngineProcess:
    """`python -m aiexport_edge.engine` at a unix socket, in a process group of its own."""

    def __init__(
        self, directory: Path, name: str, config: str, *, python: str = sys.executable, env: Mapping[str, str] = {}
    ) -> None:
        self.name = name
        self.address = f"unix:{directory / name}.sock"
        self._file = directory / f"{name}.toml"
        self._file.write_text(config)
        self._log = directory / f"{name}.log"
        self._directory = directory
        self._python = python
        self._env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [self._python, "-m", "aiexport_edge.engine", "--config", str(self._file)]
        command += ["--state", str(self._directory / f"{self.name}-state"), "--listen", self.address]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self._directory, env=self._env, start_new_session=True
            )

    def wait_ready(self, seconds: float = 300.0) -> None:
        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self._log.read_text()[-4000:]
            try:
                models = self._ask("ListModels", pb.ListModelsRequest()).models
            except grpc.RpcError:
                return False
            return bool(models) and all(model.state == pb.MODEL_READY for model in models)

        wait_until(ready, f"{self.name} is ready: {self._log}", seconds)

    def models(self) -> list[pb.ModelInfo]:
        return list(self._ask("ListModels", pb.ListModelsRequest()).models)

    def stats(self) -> pb.StatsResponse:
        found: pb.StatsResponse = self._ask("Stats", pb.StatsRequest())
        return found

    def _ask(self, method: str, request: Any) -> Any:
        with grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            return getattr(EngineStub(channel), method)(request, timeout=60)

    def drain(self) -> None:
        """It ends by itself once its requests have ended."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """The server and its core, at once."""
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)

    def log(self) -> str:
        return self._log.read_text()


class Fleet:
    """Engines and `aiexport-edge shim`. `base_url` and `key` once `start` has returned."""

    def __init__(self, directory: Path, engines: Sequence[EngineProcess], config: str) -> None:
        self.engines = list(engines)
        self._directory = directory
        self._config = config
        self._port, self._admin_port = free_port(), free_port()
        self.base_url = f"http://127.0.0.1:{self._port}"
        self.key = ""
        self._shim: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for engine in self.engines:
            engine.start()
        for engine in self.engines:
            engine.wait_ready()
        addresses = ", ".join(f'"{engine.address}"' for engine in self.engines)
        file = self._directory / "shim.toml"
        file.write_text(f"[shim]\nengines = [{addresses}]\n{self._config}")
        state = self._directory / "shim-state"
        with_store = open_store(f"sqlite:///{state / 'store.db'}")
        with_store.create_workspace("tests", "enterprise")
        self.key = with_store.create_key("tests").key
        with_store.close()
        command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "shim", "--config", str(file)]
        command += ["--state", str(state), "--port", str(self._port), "--admin-port", str(self._admin_port)]
        with (self._directory / "shim.log").open("ab") as log:
            self._shim = subprocess.Popen(command, stdout=log, stderr=log, cwd=self._directory)
        wait_until(lambda: self.num_serving() == len(self.engines), "the shim has all engines")

    def num_serving(self) -> int:
        """Engines that take requests, as the shim sees them."""
        try:
            reply = httpx.get(f"{self.base_url}/status", headers={"Accept": "application/json"}, timeout=60)
            return int(reply.json()["engines"]["serving"])
        except httpx.HTTPError:
            return 0

    def client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=self.base_url, headers={"X-API-Key": self.key}, timeout=300, limits=limits)

    def stop(self) -> None:
        if self._shim is not None:
            self._shim.terminate()
            self._shim.wait(60)
        for engine in self.engines:
            if engine.process is not None:
                engine.kill()

    def log(self) -> str:
        return (self._directory / "shim.log").read_text()
