"""`aiexport-edge engine` and `aiexport-edge shim`: one part of the installation alone, for other supervisors.

Also owns how the parts' commands are written, which `serve` uses too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
from typing import TYPE_CHECKING

from aiexport_edge.proto.config_values import grpc_address, grpc_target
from aiexport_edge.shim.cli.command import CommandError, argument_type, load_config, make_state, port_number

if TYPE_CHECKING:
    from aiexport_edge.proto.config import Config

ENGINE_EPILOG = """\
example:
  aiexport-edge engine --listen 127.0.0.1:50051
"""

SHIM_EPILOG = """\
example:
  aiexport-edge shim --engine 127.0.0.1:50051 --workers 2
"""


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    if name == "engine":
        parser.epilog = ENGINE_EPILOG
        parser.add_argument(
            "--listen",
            metavar="ADDR",
            type=argument_type(grpc_address, "address"),
            help="HOST:PORT or unix:PATH (default: 127.0.0.1:50051)",
        )
        parser.set_defaults(run=_engine)
        return
    parser.epilog = SHIM_EPILOG
    listener_options(parser)
    parser.add_argument(
        "--engine",
        metavar="ADDR",
        action="append",
        type=argument_type(grpc_target, "address"),
        help="HOST:PORT or unix:PATH of an engine, dns:///HOST:PORT for all that a name resolves to; may be repeated",
    )
    parser.add_argument("--workers", metavar="N", type=argument_type(_count, "count"), help="processes (default: 1)")
    parser.set_defaults(run=_shim)


def listener_options(parser: argparse.ArgumentParser) -> None:
    port = argument_type(port_number, "port")
    parser.add_argument("--host", metavar="HOST", help="where REST clients connect (default: 127.0.0.1)")
    parser.add_argument("--port", metavar="PORT", type=port, help="(default: 8400)")
    parser.add_argument("--admin-port", metavar="PORT", type=port, help="on loopback (default: the port + 1)")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 256):
        raise ValueError(f"must be a number from 1 to 256, not {text!r}")
    return int(text)


def require_engine_packages() -> None:
    """Raises `CommandError` where this installation is a shim's alone."""
    if importlib.util.find_spec("torch") is None:
        raise CommandError(
            "the engine's packages are not installed; run in the project's folder: pip install '.[engine]'"
        )


def check_models(config: Config) -> None:
    """Raises `ConfigError` or `CommandError` for a model that can't be loaded, by its files' names and headers."""
    from aiexport_edge.proto.config import check_sources, source_directory
    from aiexport_edge.shim.cli.weights import inspect_weights

    check_sources(config)
    for weights in config.weights:
        problem = None if weights.vllm is not None else inspect_weights(source_directory(weights.source)).problem
        if problem is not None:
            raise CommandError(problem)


def engine_command(config: Config, listen: str) -> tuple[str, ...]:
    return (*_python("aiexport_edge.engine"), *_places(config), "--listen", listen)


def shim_command(
    config: Config, rest: socket.socket, admin: socket.socket, engines: tuple[str, ...]
) -> tuple[str, ...]:
    addresses = [word for address in engines for word in ("--engine", address)]
    fds = ("--fd", str(rest.fileno()), "--admin-fd", str(admin.fileno()))
    return (*_python("aiexport_edge.shim.server"), *_places(config), *fds, *addresses)


def _python(module: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module)


def _places(config: Config) -> tuple[str, ...]:
    file = () if config.path is None else ("--config", str(config.path))
    return (*file, "--state", str(config.state))


def _engine(args: argparse.Namespace) -> int:
    config = load_config(args)
    require_engine_packages()
    check_models(config)
    make_state(config.state)
    command = engine_command(config, args.listen or config.engine.listen)
    os.execv(command[0], command)  # the engine becomes this process: its supervisor signals it directly


def _shim(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.cli import serve

    return serve.run_shims(args)
