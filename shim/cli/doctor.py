"""`aiexport-edge doctor`: what is wrong with this installation, and what to do about it.

Each check is a function that yields `Check`s; none changes anything on the machine, and none loads torch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from aiexport_edge.proto.config import Config, ConfigError, source_directory
from aiexport_edge.proto.units import split_address
from aiexport_edge.shim.cli import card_checks, engine_checks, listener_checks
from aiexport_edge.shim.cli.admin import REMEDY, lacks_login, needs_login
from aiexport_edge.shim.cli.check import OK, PROBLEM, WARNING, Check
from aiexport_edge.shim.cli.command import CommandError, json_option, load_config, opened_store, print_json
from aiexport_edge.shim.cli.crypto_keys import missing_master_keys
from aiexport_edge.shim.cli.listeners import listen
from aiexport_edge.shim.cli.own_server import is_ready
from aiexport_edge.shim.cli.rest_client import own_server
from aiexport_edge.shim.cli.serve_lock import serving
from aiexport_edge.shim.cli.weights import inspect_weights

if TYPE_CHECKING:
    from aiexport_edge.shim.store import Store

EPILOG = """\
example:
  aiexport-edge doctor
  aiexport-edge doctor --config aiexport-edge.toml --json
"""

GIB = 2**30
STATE_REMEDY = "give this user the right (chown), or name another place with --state"


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    checks = [*_software(), *_processor()]
    checks += card_checks.cards() if card_checks.has_card() else [Check("gpu", OK, "none: the processor computes")]
    try:
        config = load_config(args)
    except ConfigError as error:
        problem = str(error).removeprefix("configuration: ")
        checks.append(Check("configuration", PROBLEM, problem, "correct it, then run doctor again"))
    else:
        where = str(config.path) if config.path is not None else "none: the defaults hold"
        checks.append(Check("configuration", OK, where))
        if card_checks.has_card():
            checks += card_checks.triton(config.kernel_cache)
        checks += [*_weights(config), *_state(config), *_store(config), *_limits(config), *_ports(config)]
        checks += [*listener_checks.certificate(config), *listener_checks.traces(config)]
        checks += [*engine_checks.certificates(config), *engine_checks.engines(config)]
    well = all(check.status != PROBLEM for check in checks)
    if args.json:
        print_json({"ok": well, "checks": checks})
    else:
        for check in checks:
            print(f"{check.status:<8} {check.name}: {check.detail}")
            if check.remedy:
                print(f"{'':<8} → {check.remedy}")
    return 0 if well else 1


# ---------------------------------------------------------------------------------------------------- the machine


def _software() -> Iterator[Check]:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Check("python", OK if fits else PROBLEM, version, "" if fits else "install Python 3.11, 3.12 or 3.13")
    try:
        yield Check("torch", OK, importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        remedy = "to run an engine on this machine, in the project's folder: pip install '.[engine]'"
        yield Check("torch", WARNING, "not installed: only the shim can run here", remedy)


def _processor() -> Iterator[Check]:
    flags = _cpu_flags()
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16") if name in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{platform.machine()}, {cores} cores; {', '.join(features) or 'no vector instructions that matter here'}"
    old = platform.machine() == "x86_64" and bool(flags) and "avx2" not in flags
    yield Check(
        "processor", WARNING if old else OK, detail, "use a processor with AVX2: this one is slow" if old else ""
    )
    has_bf16 = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    yield Check("bf16", OK, "yes" if has_bf16 else "no: models run in float32 on this processor")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    line = next((line for line in lines if line.lower().startswith(("flags", "features"))), ":")
    return set(line.partition(":")[2].split())


# ---------------------------------------------------------------------------------------------------- the installation


def _weights(config: Config) -> Iterator[Check]:
    total = 0
    for spec in config.weights:
        directory = source_directory(spec.source)
        if config.shim.engines and not directory.is_dir():
            yield Check(f"model {spec.name}", OK, "not on this machine: the engines of [shim] engines have it")
            continue
        found = inspect_weights(directory)
        total += found.num_bytes
        if found.problem is None:
            detail = f"{len(found.files)} files, {found.num_bytes / 2**20:,.0f} MiB"
            yield Check(f"model {spec.name}", OK, detail)
        else:
            sentence, _, remedy = found.problem.rpartition("; ")
            yield Check(f"model {spec.name}", PROBLEM, sentence, remedy)
    available = _available_memory()
    if available is not None:
        # Those of a server that runs are in memory already, a card's in the card's.
        on_card = card_checks.has_card() and config.engine.device != "cpu"
        short = total > available and not on_card and serving(config.state) is None
        detail = f"{available / GIB:.1f} GiB available, {total / GIB:.1f} GiB of weights"
        yield Check("memory", PROBLEM if short else OK, detail, "free memory or serve a smaller model" if short else "")


def _available_memory() -> int | None:
    """Bytes, from /proc/meminfo; None where there is none."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _state(config: Config) -> Iterator[Check]:
    state = config.state
    try:
        mode = state.stat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        yield Check("state", PROBLEM, f"{state} cannot be looked into ({error.strerror})", STATE_REMEDY)
        return
    there = next(path for path in (state, *state.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.R_OK | os.W_OK | os.X_OK)):
        yield Check("state", PROBLEM, f"{there} cannot be written", STATE_REMEDY)
    elif mode is None:
        yield Check("state", OK, f"{state} is made at the first start")
    elif mode & 0o077:
        yield Check("state", WARNING, f"{state} can be read by other users", f"chmod 700 {shlex.quote(str(state))}")
    else:
        yield Check("state", OK, str(state))
    free = shutil.disk_usage(there).free
    low = free < GIB
    remedy = "free at least 1 GiB, or move the state with --state" if low else ""
    yield Check("disk", PROBLEM if low else OK, f"{free / GIB:.1f} GiB free at {there}", remedy)


def _store(config: Config) -> Iterator[Check]:
    file = config.store.url.removeprefix("sqlite:///")
    if file != config.store.url:
        try:
            os.stat(file)
        except FileNotFoundError:
            yield Check("store", OK, f"{file} is made at the first start")
            if needs_login(config):
                yield Check("admin login", PROBLEM, f"{config.admin_listen} can be reached and has no login", REMEDY)
            return
        except OSError as error:
            yield Check("store", PROBLEM, f"{file} cannot be looked for ({error.strerror})", STATE_REMEDY)
            return
    from aiexport_edge.shim.cli.clock_checks import clock

    try:
        with opened_store(config) as store:
            yield Check("store", OK, f"{len(store.list_workspaces())} workspaces")
            without_login = lacks_login(config, store)
            if without_login is not None:
                yield Check("admin login", PROBLEM, without_login, REMEDY)
            yield from _master_key(config, store)
            yield from clock(store.database)
    except CommandError as error:
        sentence, _, remedy = str(error).rpartition("; ")
        remedy = remedy if sentence else "correct [store] url, or start the database it names"
        yield Check("store", PROBLEM, sentence or str(error), remedy)


def _master_key(config: Config, store: Store) -> Iterator[Check]:
    from aiexport_edge.shim.secrets import SecretError

    try:
        missing = missing_master_keys(config, store)
    except SecretError as error:
        yield Check("master key", PROBLEM, str(error), "correct it, or restore it from its backup")
        return
    if missing:
        detail = f"secrets are sealed under {', '.join(missing)}, not here"
        remedy = f"restore it from its backup to {config.state / 'master.key'}, or set AIEXPORT_MASTER_KEY"
        yield Check("master key", PROBLEM, detail, remedy)


def _limits(config: Config) -> Iterator[Check]:
    if not config.limits.redis_url:
        return
    if importlib.util.find_spec("redis") is None:
        remedy = "run in the project's folder: pip install '.[redis]'"
        yield Check("redis", PROBLEM, "[limits] redis_url needs Redis's client, which is not installed", remedy)
        return
    from aiexport_edge.shim.limits.redis_window import why_silent

    problem = why_silent(config.limits.redis_url, config.limits.redis_password_file)
    remedy = "" if problem is None else "start it, or correct [limits] redis_url and redis_password_file"
    detail = f"no answer at {config.limits.redis_url}: {problem}" if problem else config.limits.redis_url
    yield Check("redis", PROBLEM if problem else OK, detail, remedy)


def _ports(config: Config) -> Iterator[Check]:
    running = serving(config.state)
    if running is not None:
        url = own_server(config).url
        where = f"serve runs here (pid {running.pid})"
        if is_ready(own_server(config)):
            yield Check("service", OK, f"{where} and is ready at {url}")
        else:
            remedy = "wait while it starts; else see its log, and the engine below"
            yield Check("service", PROBLEM, f"{where}, but is not ready at {url}", remedy)
        return
    admin = split_address(config.admin_listen)
    for name, (host, port) in (("port", (config.shim.host, config.shim.port)), ("admin port", admin)):
        try:
            listen(host, port, f"--{name.replace(' ', '-')}").close()
        except CommandError as error:
            sentence, _, remedy = str(error).rpartition("; ")
            yield Check(name, PROBLEM, sentence, remedy)
        else:
            yield Check(name, OK, f"{port} on {host} is free")
