"""A real shim over real sockets in this process: uvicorn on a loop and thread of its own, the store in a directory."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop

from aiexport_edge.proto import config as configuration
from aiexport_edge.shim.app import create_admin_app, create_app
from aiexport_edge.shim.engines.engines import Engines
from aiexport_edge.shim.server import server
from aiexport_edge.shim.services import Services
from aiexport_edge.shim.store import CreatedKey, Store, open_store
from aiexport_edge.shim.tls import Certificate

HAIKU = "apex-haiku-4-20250401"
SONNET = "apex-sonnet-4-20250501"


def until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Polls until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.005)


class ShimServer:
    """`base_url` and `admin_url` answer from `start` to `stop`. The workspace `acme` is on Enterprise.

    `configure` changes the configuration before anything is made of it.
    """

    def __init__(
        self,
        state: Path,
        addresses: tuple[str, ...],
        *,
        ping_s: float = 10.0,
        configure: Callable[[configuration.Config], configuration.Config] = lambda config: config,
        **settings: Any,
    ) -> None:
        config = configure(configuration.load(None, state))
        limits = {name: settings.pop(name) for name in ("max_body_bytes", "inflight_body_bytes") if name in settings}
        self.config = replace(config, shim=replace(config.shim, **limits))
        self._addresses = addresses
        self._ping_s = ping_s
        self._settings = settings
        self.store: Store = open_store(self.config.store.url)
        if not self.store.list_workspaces():
            self.store.create_workspace("acme", "enterprise")
        self.key: CreatedKey = self.store.create_key("acme")
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.base_url, self.admin_url = (f"http://127.0.0.1:{s.getsockname()[1]}" for s in self._sockets)
        tls = self.config.tls
        self.certificate = Certificate(tls.cert, tls.key) if tls.cert and tls.key else None
        if self.certificate is not None:
            self.base_url = self.base_url.replace("http:", "https:")
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.servers: list[uvicorn.Server] = []

    def start(self) -> None:
        self._thread.start()
        until(lambda: len(self.servers) == 2 and all(each.started for each in self.servers), "both listeners are up")

    def stop(self) -> None:
        for each in self.servers:
            each.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()
        self.store.close()

    def wait_ready(self) -> None:
        with httpx.Client(verify=self.certificate is None) as client:
            until(lambda: client.get(f"{self.base_url}/readyz").status_code == 200, "the shim is ready")

    def client(self, key: str | None = None, **kwargs: Any) -> httpx.Client:
        return httpx.Client(
            base_url=self.base_url, headers={"X-API-Key": self.key.key if key is None else key}, timeout=60, **kwargs
        )

    def address(self) -> tuple[str, int]:
        host, _, port = self.base_url.partition("://")[2].partition(":")
        return host, int(port)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.engines = Engines(self._addresses, client="test", **self._settings)
        self.services = Services(self.config, self.store, self.engines)
        self.servers = [
            server(
                create_app(self.services, ping_s=self._ping_s),
                drain_s=2,
                max_connections=self.config.shim.max_connections,
                certificate=self.certificate,
            ),
            server(create_admin_app(self.services), drain_s=1),
        ]

        renewing = None if self.certificate is None else asyncio.create_task(self.certificate.run())
        async with asyncio.TaskGroup() as group:
            for each, listener in zip(self.servers, self._sockets, strict=True):
                group.create_task(each.serve(sockets=[listener]))
        if renewing is not None:
            renewing.cancel()
