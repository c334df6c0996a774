"""A server of our own for as long as a command needs one, and a key for it.

Knows `serve`'s options; nothing of what is asked of the server.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from aiexport_edge.proto import config as configuration
from aiexport_edge.proto.config import Config
from aiexport_edge.proto.config_store import default_url
from aiexport_edge.shim.cli.admin import needs_login
from aiexport_edge.shim.cli.command import CommandError, make_state, opened_store
from aiexport_edge.shim.cli.rest_client import NoReply, Server, Unreachable, exchange, own_server

START_S = 600.0  # a large model is read from disk meanwhile
PROBE_S = 0.05  # between two questions for readiness
STOP_S = 60.0
KEY_LIFE = timedelta(hours=1)  # of a temporary key that nobody has revoked: the command was killed


@contextmanager
def temporary_key(config: Config) -> Iterator[str]:
    """A key of a workspace of its own, without limits. Both end with the context; the usage rows stay."""
    with opened_store(config) as store:
        name = f"bench_{secrets.token_hex(4)}"
        store.create_workspace(name, "enterprise", requests_per_minute=0, tokens_per_day=0)
        try:
            yield store.create_key(name, scopes=["messages"], expires_in=KEY_LIFE).key
        finally:
            store.delete_workspace(name)


@contextmanager
def own_state(config: Config) -> Iterator[Config]:
    """The same configuration on an empty state directory beside the real one's files, so that nothing of that changes
    and no batch of it goes on. It is the real state where that has what the configuration needs: the secrets of a store
    that it names, the login of an admin listener beyond loopback.
    """
    make_state(config.state)
    if needs_login(config) or config.store.url != default_url(config.state):
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=config.state) as folder:
        yield configuration.load(config.path, Path(folder))


@contextmanager
def running(config: Config, *, kernels: Path) -> Iterator[Server]:
    """`serve` on free ports of loopback, ready, until the context ends. `kernels`: where compiled ones are kept.

    Raises `CommandError` with its last words where it does not start.
    """
    rest, admin = _free_port(), _free_port()
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "serve", "--state", str(config.state)]
    command += [] if config.path is None else ["--config", str(config.path)]
    command += ["--host", "127.0.0.1", "--port", str(rest), "--admin-port", str(admin)]
    found = own_server(config)
    server = Server("127.0.0.1", rest, "", found.tls)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels)}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment) as process,
    ):
        try:
            _until_ready(server, process, log.fileno())
            yield server
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            finally:
                process.kill()


def _until_ready(server: Server, process: subprocess.Popen[bytes], log: int) -> None:
    deadline = time.monotonic() + START_S
    while not is_ready(server):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = os.pread(log, 1 << 20, 0).decode(errors="replace").splitlines()
            reason = lines[-1].removeprefix("aiexport-edge: ") if lines else f"it took more than {START_S:.0f} s"
            raise CommandError(f"the server for the measurement did not start: {reason}")
        time.sleep(PROBE_S)


def is_ready(server: Server) -> bool:
    """Whether it answers and has a model to serve."""
    try:
        with exchange(server, "/readyz", timeout=5) as reply:
            return reply.status == 200
    except (Unreachable, NoReply):
        return False


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
