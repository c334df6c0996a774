"""`aiexport-edge serve`: the whole installation on this machine, in one command.

Owns the listening sockets, the order of start and end, and the one-per-state lock. Engine and shim start side by side;
on SIGTERM the shims finish their streams first, then the engine ends. Knows nothing of requests.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import signal
import socket
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from typing import Any, TypeVar

from aiexport_edge.proto.config import Config
from aiexport_edge.proto.units import join_address, split_address
from aiexport_edge.shim.cli import processes, serve_lock, welcome
from aiexport_edge.shim.cli.admin import admin_url, require_login
from aiexport_edge.shim.cli.command import CommandError, load_config, make_state
from aiexport_edge.shim.cli.listeners import engine_socket, listen, reachable_host
from aiexport_edge.shim.cli.supervisor import Child, ChildSpec, StartFailed, log

T = TypeVar("T")

EPILOG = """\
example:
  aiexport-edge serve
  aiexport-edge serve --config aiexport-edge.toml --port 8080
"""

SHIM_MARGIN = 5.0  # seconds past the drain that a shim gets to write its accounts
IMPATIENT = 0.5  # seconds after which a second Ctrl-C is another one
_SHIM_SECRETS = ("AIEXPORT_MASTER_KEY",)  # no business of the engine's
ENGINE_PATIENCE = 15.0  # seconds for an engine that nobody uses any more


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    processes.listener_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """`serve`: engine and shims."""
    config = _with_options(load_config(args), args)
    processes.require_engine_packages()
    processes.check_models(config)
    make_state(config.state)
    os.umask(0o077)
    require_login(config)
    with ExitStack() as stack:
        announce = stack.enter_context(serve_lock.held(config.state))
        rest, admin = _listeners(config, stack)
        announce(*(join_address(reachable_host(sock), sock.getsockname()[1]) for sock in (rest, admin)))
        address = "unix:" + str(stack.enter_context(engine_socket(config.state)))
        engine = ChildSpec("engine", processes.engine_command(config, address), hidden=_SHIM_SECRETS)
        return asyncio.run(_Installation(config, rest, admin, engine, (address, *config.shim.engines)).run())


def run_shims(args: argparse.Namespace) -> int:
    """`shim`: shims alone, for engines that run elsewhere."""
    config = _with_options(load_config(args), args)
    make_state(config.state)
    os.umask(0o077)
    require_login(config)
    engines = tuple(args.engine or config.engine_addresses)
    with ExitStack() as stack:
        rest, admin = _listeners(config, stack)
        return asyncio.run(_Installation(config, rest, admin, None, engines).run())


def _with_options(config: Config, args: argparse.Namespace) -> Config:
    """The configuration with what the command line says on top."""
    shim = config.shim
    shim = dataclasses.replace(
        shim,
        host=args.host or shim.host,
        port=args.port or shim.port,
        workers=getattr(args, "workers", None) or shim.workers,
    )
    admin = config.admin
    if args.admin_port:
        host, _ = split_address(config.admin.listen or "127.0.0.1:1")
        admin = dataclasses.replace(admin, listen=join_address(host, args.admin_port))
    config = dataclasses.replace(config, shim=shim, admin=admin)
    if shim.port == 65535 and not admin.listen:
        raise CommandError("port 65535 leaves no port + 1 for the admin listener; name one with --admin-port")
    return config


def _listeners(config: Config, stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    admin_host, admin_port = split_address(config.admin_listen)
    if (admin_host, admin_port) == (config.shim.host, config.shim.port):
        raise CommandError(f"port {admin_port} is to be both REST's and the operator's; choose another --admin-port")
    rest = stack.enter_context(listen(config.shim.host, config.shim.port, "--port"))
    return rest, stack.enter_context(listen(admin_host, admin_port, "--admin-port"))


class _Installation:
    """The running parts, from the first fork to the last exit."""

    def __init__(
        self,
        config: Config,
        rest: socket.socket,
        admin: socket.socket,
        engine: ChildSpec | None,
        engines: tuple[str, ...],
    ) -> None:
        self._config = config
        self._rest = rest
        self._admin = admin
        self._engine_spec = engine
        command = processes.shim_command(config, rest, admin, engines)
        fds = (rest.fileno(), admin.fileno())
        self._shim_specs = [ChildSpec(f"shim {i + 1}", command, fds) for i in range(config.shim.workers)]
        self._engine: list[Child] = []  # none, or one
        self._shims: list[Child] = []
        self._stop = asyncio.Event()
        self._asked_at = 0.0

    async def run(self) -> int:
        """Until a signal: 0. Raises `CommandError` where a part gives up before the installation was ever ready."""
        loop = asyncio.get_running_loop()
        # What is run by nohup goes on when its terminal is closed.
        hang_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
        for number in (signal.SIGTERM, signal.SIGINT, *hang_up):
            loop.add_signal_handler(number, self._on_signal, number)
        serving = asyncio.ensure_future(self._serve())
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
            if not self._stop.is_set():
                await serving  # never returns: it raises what went wrong
            return 0
        except StartFailed as error:
            raise CommandError(str(error)) from None
        except welcome.NothingServes:
            raise CommandError("no model could be loaded; the engine's messages above say why") from None
        finally:
            serving.cancel()
            stopping.cancel()
            await asyncio.wait([serving, stopping])
            await self._drain()

    def _on_signal(self, number: signal.Signals) -> None:
        """Drains. A person who presses Ctrl-C again after a while wants it over at once; the same signal twice in a row
        is only a process group that was signalled along with its leader."""
        now = time.monotonic()
        if not self._stop.is_set():
            self._asked_at = now
            self._stop.set()
        elif number == signal.SIGINT and now - self._asked_at > IMPATIENT:
            for child in self._shims + self._engine:
                child.kill()

    async def _serve(self) -> None:
        """Starts everything, says when it is ready, then watches until a child is given up."""
        log(f"starting {self._parts()} on {join_address(*self._rest.getsockname()[:2])}")
        if self._engine_spec is not None:
            self._engine = [Child(self._engine_spec, log)]
        # The store is made ready while the engine loads, and before several shims would all do it.
        greeting = await self._unless_given_up(
            asyncio.to_thread(welcome.prepare, self._config, demo=bool(self._engine))
        )
        self._shims = [Child(spec, log) for spec in self._shim_specs]
        elsewhere = self._engine_spec is None or bool(self._config.shim.engines)
        await self._unless_given_up(
            welcome.until_ready(self._rest, tls=self._config.tls.cert is not None, elsewhere=elsewhere)
        )
        for child in self._shims + self._engine:
            child.proven = True
        await asyncio.to_thread(welcome.show, greeting, self._config, self._rest)
        log(f"the operator's console: {admin_url(self._config, self._admin)}/console")
        await self._unless_given_up(asyncio.Event().wait())

    async def _unless_given_up(self, work: Coroutine[None, None, T]) -> T:
        """The result of `work`; raises `StartFailed` as soon as a child is given up."""
        task = asyncio.ensure_future(work)
        ended: list[asyncio.Future[Any]] = [child.ended for child in self._shims + self._engine]
        try:
            await asyncio.wait([task, *ended], return_when=asyncio.FIRST_COMPLETED)
            for child in ended:
                if child.done():
                    await child
            return await task
        finally:
            task.cancel()

    async def _drain(self) -> None:
        """Nothing new, then the streams' ends, then the engine's."""
        log("stopping: open streams may finish")
        self._rest.close()
        self._admin.close()
        patience = self._config.shim.drain.total_seconds() + SHIM_MARGIN
        await asyncio.gather(*(shim.stop(patience) for shim in self._shims))
        for engine in self._engine:
            await engine.stop(ENGINE_PATIENCE)

    def _parts(self) -> str:
        workers = len(self._shim_specs)
        shims = f"{workers} shim worker{'s' if workers > 1 else ''}"
        if self._engine_spec is None:
            return shims
        return f"the engine ({', '.join(spec.name for spec in self._config.weights)}) and {shims}"
