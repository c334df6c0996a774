"""What `serve` prints when it is ready, and the demo workspace that a first start makes.

Owns the file `first-start` in the state directory: it is there from before the demo workspace is made until its key has
been printed, so that a start that dies in between is a first start again. It holds the id of that key, which is then
revoked: nobody has seen it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import socket
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiexport_edge.proto.config import Config
from aiexport_edge.proto.units import is_loopback, join_address
from aiexport_edge.shim.cli.command import CommandError, opened_store
from aiexport_edge.shim.cli.listeners import reachable_host

if TYPE_CHECKING:
    from aiexport_edge.shim.store import Store

WORKSPACE = "demo"
MARKER = "first-start"
KEY_FILE = "demo-key"
PROBE_SECONDS = 0.05  # between two questions for readiness
PROBE_TIMEOUT = 10.0
READY, FAILED = "ready", "failed"  # of a model, as /readyz says it


@dataclass(frozen=True, slots=True)
class Greeting:
    """What there is to say: the demo workspace's new key, or which workspaces there are."""

    key: str | None
    workspaces: tuple[str, ...]


def prepare(config: Config, *, demo: bool) -> Greeting:
    """Opens the store, which migrates it; on a first start without a configuration (`demo`) makes a key."""
    marker = config.state / MARKER
    with opened_store(config) as store:
        names = tuple(workspace.name for workspace in store.list_workspaces())
        first = demo and config.path is None and (not names or marker.exists())
        if not first:
            return Greeting(None, names)
        return Greeting(_demo_key(store, names, marker), (WORKSPACE,))


def _demo_key(store: Store, names: tuple[str, ...], marker: Path) -> str:
    unseen = marker.read_text().strip() if marker.exists() else ""
    marker.touch(mode=0o600)
    if WORKSPACE not in names:
        store.create_workspace(WORKSPACE, "enterprise")
    for key in store.list_keys(WORKSPACE):
        if key.key_id == unseen:
            store.revoke_key(unseen)
    created = store.create_key(WORKSPACE)
    marker.write_text(created.key_id)
    return created.key


class NothingServes(Exception):
    """Every model has failed: trying again would change nothing."""


async def until_ready(rest: socket.socket, *, tls: bool, elsewhere: bool) -> None:
    """Returns when the installation says on its own listener that it serves a model. Raises `NothingServes`, but for
    engines `elsewhere`, which may be mended meanwhile.
    """
    host, port = reachable_host(rest), rest.getsockname()[1]
    while True:
        with contextlib.suppress(OSError, asyncio.TimeoutError, ValueError, LookupError):
            states = await asyncio.wait_for(_readyz(host, port, own_tls() if tls else None), PROBE_TIMEOUT)
            if READY in states:
                return
            if states == {FAILED} and not elsewhere:
                raise NothingServes
        await asyncio.sleep(PROBE_SECONDS)


def own_tls() -> ssl.SSLContext:
    """For talking to our own listener: its certificate names the host that clients use, not this address."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def _readyz(host: str, port: int, tls: ssl.SSLContext | None) -> set[str]:
    """The states of the models."""
    reader, writer = await asyncio.open_connection(host, port, ssl=tls)
    try:
        writer.write(f"GET /readyz HTTP/1.1\r\nHost: {join_address(host, port)}\r\nConnection: close\r\n\r\n".encode())
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
        return {tier["state"] for tier in json.loads(body)["tiers"]}
    finally:
        writer.close()


def show(greeting: Greeting, config: Config, rest: socket.socket) -> None:
    """Prints on stdout where to send requests and with which key."""
    scheme = "http" if config.tls.cert is None else "https"
    root = f"{scheme}://{join_address(reachable_host(rest), rest.getsockname()[1])}"
    lines = [f"AI Export Edge serves {root}/v2"]
    if not is_loopback(rest.getsockname()[0]):
        lines[0] += f" (listening on {join_address(*rest.getsockname()[:2])})"
    if greeting.key is None:
        lines += _how_to_make_a_key(greeting, config)
    elif is_loopback(rest.getsockname()[0]):
        lines += ["", f"API key (workspace {WORKSPACE}; shown only now):", greeting.key]
        lines += ["", "Try it:", _curl(config, root, shlex.quote(f"X-API-Key: {greeting.key}"))]
    else:
        path = _write_key(config.state, greeting.key)
        lines += ["", f"API key of workspace {WORKSPACE}, in a file that only this user can read:", str(path)]
        lines += ["", "Try it:", _curl(config, root, f'"X-API-Key: $(cat {shlex.quote(str(path))})"')]
    print("\n".join(lines), flush=True)
    (config.state / MARKER).unlink(missing_ok=True)


def _curl(config: Config, root: str, header: str) -> str:
    """A streaming request, as a line to paste into a shell."""
    model = next((model for model in config.models if model.family == "haiku"), config.models[0]).id
    body = f'{{"model":"{model}","max_tokens":200,"messages":[{{"role":"user","content":"What are you?"}}]}}'
    return f"curl -N {root}/v2/messages/stream -H {header} -H 'Content-Type: application/json' -d '{body}'"


def _how_to_make_a_key(greeting: Greeting, config: Config) -> list[str]:
    program = _program()
    places = f" --state {shlex.quote(str(config.state))}"
    if config.path is not None:
        places += f" --config {shlex.quote(str(config.path))}"
    make_key = f"{program} keys create --workspace {{}}{places}"
    if greeting.workspaces:
        name = WORKSPACE if WORKSPACE in greeting.workspaces else greeting.workspaces[0]
        return ["", "Make a key with:", make_key.format(name)]
    make_workspace = f"{program} workspaces create main --plan enterprise{places}"
    return ["", "There is no workspace yet. Make one and its key with:", make_workspace, make_key.format("main")]


def _program() -> str:
    """How this very program is called from a shell here."""
    called = Path(sys.argv[0])
    if called.name != "aiexport-edge":
        return f"{shlex.quote(sys.executable)} -m aiexport_edge.shim.cli.main"
    found = shutil.which("aiexport-edge")
    return "aiexport-edge" if found and Path(found).resolve() == called.resolve() else shlex.quote(str(called))


def _write_key(state: Path, key: str) -> Path:
    path = state / KEY_FILE
    path.unlink(missing_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise CommandError(
            f"the key's file {path} cannot be written ({error.strerror}); give this user the right"
        ) from None
    with os.fdopen(descriptor, "w") as file:
        file.write(key + "\n")
        file.flush()
        os.fsync(file.fileno())
    return path
