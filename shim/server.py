"""A shim worker process: `python -m aiexport_edge.shim.server --state D --fd N [--admin-fd M] [--engine ADDR]…`.

Takes its listening sockets by file descriptor, so that whoever owns them can replace this process without a dropped
connection. SIGTERM drains: no new connections, open streams may go on for `[shim] drain`, then exit 0.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
import uvloop
from starlette.applications import Starlette

from aiexport_edge.proto import config as configuration
from aiexport_edge.proto import grpc_polling
from aiexport_edge.proto.lifetime import die_with_parent
from aiexport_edge.proto.units import is_loopback
from aiexport_edge.shim import memory

if TYPE_CHECKING:
    from aiexport_edge.shim.tls import Certificate

KEEP_ALIVE_S = 75
BACKLOG = 2048
_MOST_FILES = 1 << 16
ENDING_S = 2  # for the last events of streams that are cut at the end of the drain

log = logging.getLogger("aiexport_edge.shim")


class _Server(uvicorn.Server):
    """Leaves the signals to `serve`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(arguments: list[str] | None = None) -> int:
    die_with_parent()
    sys.setswitchinterval(0.0005)  # threads read large bodies: the event loop waits a tenth of the usual 5 ms
    memory.set_up()
    _raise_file_limit()
    parser = argparse.ArgumentParser(prog="aiexport_edge.shim.server", description=__doc__)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--fd", type=int, required=True, help="listening socket for REST clients")
    parser.add_argument("--admin-fd", type=int, help="listening socket for the operator")
    parser.add_argument("--engine", action="append", default=[], metavar="ADDR")
    args = parser.parse_args(arguments)
    try:
        config = configuration.load(args.config, args.state)
    except configuration.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from aiexport_edge.shim import logs
    from aiexport_edge.shim.worker_counts import forget_dead_workers, run_directory

    directory = run_directory(config.state)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)  # read when prometheus_client is imported
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read when grpc is imported; it writes its own lines to stderr
    grpc_polling.settle()
    listener = logs.set_up(config.telemetry.log_level, config.telemetry.log_format)
    forget_dead_workers(directory)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(config, args.fd, args.admin_fd, tuple(args.engine) or config.engine_addresses))
    finally:
        listener.stop()


def _raise_file_limit() -> None:
    """As many descriptors as this user may have: a connection is one, and shells give 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def serve(config: configuration.Config, fd: int, admin_fd: int | None, addresses: tuple[str, ...]) -> int:
    """Serves until SIGTERM or SIGINT, then drains. Returns the exit status."""
    from aiexport_edge.proto.tracing import TracingError
    from aiexport_edge.shim.app import create_admin_app, create_app
    from aiexport_edge.shim.engines.access import AccessError, EngineAccess
    from aiexport_edge.shim.engines.engines import Engines
    from aiexport_edge.shim.engines.routing import Policy
    from aiexport_edge.shim.errors import Overloaded
    from aiexport_edge.shim.services import Services
    from aiexport_edge.shim.store import StoreError, open_store
    from aiexport_edge.shim.tls import Certificate, CertificateError

    certificate = None
    try:
        if config.tls.cert is not None and config.tls.key is not None:
            certificate = Certificate(config.tls.cert, config.tls.key)
        store = open_store(config.store.url)
        shim = config.shim
        access = EngineAccess(shim.engine_ca, shim.engine_cert, shim.engine_key, shim.engine_token_file)
        access.check()
        engines = Engines(
            addresses,
            client=f"shim-{os.getpid()}",
            access=access,
            policy=Policy(shim.routing),
            resolve_s=shim.engine_resolve.total_seconds(),
        )
        services = Services(config, store, engines)
    except (AccessError, CertificateError, StoreError, TracingError, OSError) as error:
        log.error("%s", error)
        return 1
    drain_s = int(config.shim.drain.total_seconds())
    rest = server(
        create_app(services), drain_s=drain_s, max_connections=config.shim.max_connections, certificate=certificate
    )
    servers = [(rest, socket.socket(fileno=fd))]
    if admin_fd is not None:
        admin = socket.socket(fileno=admin_fd)
        public = not is_loopback(str(admin.getsockname()[0]))
        encrypted = certificate if public and not config.admin.plain_http else None
        app = create_admin_app(services, public=public)
        servers.append((server(app, drain_s=1, certificate=encrypted), admin))
    loop = asyncio.get_running_loop()

    def drain() -> None:
        if servers[0][0].should_exit:
            return
        log.info("draining")
        for each, _ in servers:
            each.should_exit = True
        ending = Overloaded("This server is being replaced; send the request again.", retry_after=1.0)
        loop.call_later(max(0, drain_s - ENDING_S), engines.end_all, ending)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain)
    renewing = None if certificate is None else asyncio.create_task(certificate.run())
    gc.freeze()  # what is there now stays: collections walk over requests alone
    try:
        await asyncio.gather(*(each.serve(sockets=[listener]) for each, listener in servers))
    finally:
        if renewing is not None:
            renewing.cancel()
        store.close()
    return 0


def server(
    app: Starlette, *, drain_s: int, max_connections: int = 0, certificate: Certificate | None = None
) -> uvicorn.Server:
    """uvicorn around an application, with nothing of its own in the log; `max_connections` 0: as many as by default."""
    from aiexport_edge.shim.http_protocol import MAX_CONNECTIONS, HttpProtocol

    class Protocol(HttpProtocol):
        pass

    Protocol.max_connections = max_connections or MAX_CONNECTIONS

    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # `exchange.py` logs what goes wrong, once
    logging.getLogger("uvicorn.access").setLevel(logging.CRITICAL)  # it would write query strings
    settings = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
        backlog=BACKLOG,
    )
    if certificate is not None:
        settings.load()
        settings.ssl = certificate.context
    return _Server(settings)


if __name__ == "__main__":
    sys.exit(main())
