"""`aiexport-edge adapters add`: from a directory to a model that a workspace can name.

Owns the order: what can be seen from here is checked first; a directory outside the operator's roots is copied into the
state directory; every engine that answers reads and checks it; then it is stored, for the shims to bring it to the
engines.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiexport_edge.proto.config import Config, ModelSpec, source_directory
from aiexport_edge.proto.config_values import CUSTOM
from aiexport_edge.proto.units import is_loopback, split_address
from aiexport_edge.shim.adapter_copies import FILES, AdapterCopies, CopyError
from aiexport_edge.shim.cli.command import (
    CommandError,
    load_config,
    make_state,
    opened_store,
    plain,
    print_json,
    print_record,
)
from aiexport_edge.shim.cli.models_import import Progress
from aiexport_edge.shim.cli.ownership import hand_over

if TYPE_CHECKING:
    from aiexport_edge.shim.engines.access import Endpoint, EngineAccess
    from aiexport_edge.shim.store.adapter_rows import AdapterRows

READ_S = 120.0  # for an engine to read every byte of an adapter's files
ANSWER_S = 5.0


def run(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.adapter_rows import AdapterRows

    config = load_config(args)
    base_id, base = _base(config, args.base)
    directory = Path(os.path.abspath(args.directory.expanduser()))
    with opened_store(config) as store:
        workspace = store.get_workspace(args.workspace)
        rows = AdapterRows(store.database)
        rows.check_free(args.workspace, args.id)
        in_root = any(directory.resolve().is_relative_to(root.resolve()) for root in config.adapters.roots)
        if directory.is_dir():
            _check(base, directory)
        elif not in_root or not config.shim.engines:
            raise CommandError(f"there is no directory {directory}; name the one that PEFT's save_pretrained wrote")
        with _placed(config, directory, rows, in_root=in_root) as path:
            num_engines = asyncio.run(_try(config, base, path))
            adapter = rows.add(args.workspace, args.id, base=base_id, path=path)
    if args.json:
        print_json(adapter)
    else:
        print_record(plain(adapter))
    if not num_engines:
        print("no engine answers just now: it is read anew, and checked, when one starts", file=sys.stderr)
    if CUSTOM not in config.plans[workspace.plan].families:
        print(
            f"the plan {workspace.plan} has no fine-tuned models, so {workspace.name} can't use it yet; change it: "
            f"aiexport-edge workspaces set {workspace.name} --plan enterprise",
            file=sys.stderr,
        )
    return 0


async def any_engine(config: Config) -> bool:
    """Whether any engine answers."""
    import grpc.aio

    from aiexport_edge.proto import engine_pb2 as pb
    from aiexport_edge.proto.engine_pb2_grpc import EngineStub
    from aiexport_edge.shim.engines.access import AccessError

    access, endpoints = await _engines(config)
    for endpoint in endpoints:
        try:
            async with access.channel(endpoint) as channel:
                stub: Any = EngineStub(channel)
                await stub.ListAdapters(pb.ListAdaptersRequest(), metadata=access.metadata(), timeout=ANSWER_S)
                return True
        except (AccessError, grpc.aio.AioRpcError):
            continue
    return False


def _base(config: Config, wanted: str) -> tuple[str, ModelSpec]:
    """The listed model that is meant, by an id or by one without its date."""
    form = re.compile(re.escape(wanted) + r"(-\d{8})?", re.ASCII)
    found = [(model_id, spec) for spec in config.models for model_id in spec.ids if form.fullmatch(model_id)]
    if not found:
        ids = ", ".join(model_id for spec in config.models for model_id in spec.ids)
        raise CommandError(f"there is no model {wanted}; choose one of {ids}")
    return max(found, key=lambda each: (each[0] == wanted, each[0]))


def _check(base: ModelSpec, directory: Path) -> None:
    """Whether it is an adapter, and fits the model where that lies here: asked of the engine's own reader, in a process
    of its own. Raises `CommandError`.
    """
    model = source_directory(base.source)
    if importlib.util.find_spec("torch") is None or not model.is_dir():
        if not (directory / FILES[0]).is_file():
            raise CommandError(f"{directory} holds no {FILES[0]}; name the directory that PEFT's save_pretrained wrote")
        return
    command = [sys.executable, "-m", "aiexport_edge.engine.adapters.check"]
    command += ["--model", str(model), "--adapter", str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=READ_S, check=False)
        problem = json.loads(done.stdout)["problem"]
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CommandError(f"the engine's reader of adapters cannot be asked ({error})") from None
    if problem is not None:
        raise CommandError(problem)


@contextmanager
def _placed(config: Config, directory: Path, rows: AdapterRows, *, in_root: bool) -> Iterator[str]:
    """Where engines find it. A copy that nothing uses at the end is gone. Raises `CommandError`."""
    if in_root:
        yield str(directory)
        return
    make_state(config.state)
    copies = AdapterCopies(config.adapter_copies)
    try:
        with copies.locked(wait=True):
            path = str(copies.take(directory, Progress().add))
            hand_over(config.state)
            try:
                yield path
            finally:
                if path not in {adapter.path for adapter in rows.list()}:
                    copies.remove(path)
    except CopyError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{copies.root} can't be used ({error.strerror or type(error).__name__})") from None


async def _engines(config: Config) -> tuple[EngineAccess, list[Endpoint]]:
    """Every engine of the shim here, those behind names too; a name without an address is told of."""
    from aiexport_edge.shim.cli.status import engine_targets
    from aiexport_edge.shim.engines.access import EngineAccess
    from aiexport_edge.shim.engines.probe import endpoints_of

    shim = config.shim
    endpoints, nameless = await endpoints_of(engine_targets(config))
    for name in nameless:
        print(f"{name} has no address just now; its engines were not asked", file=sys.stderr)
    return EngineAccess(shim.engine_ca, shim.engine_cert, shim.engine_key, shim.engine_token_file), endpoints


async def _try(config: Config, base: ModelSpec, path: str) -> int:
    """Has every engine that answers read and check the adapter; how many did. Raises `CommandError` for a refusal."""
    import grpc
    import grpc.aio

    from aiexport_edge.proto import engine_pb2 as pb
    from aiexport_edge.proto.engine_pb2_grpc import EngineStub
    from aiexport_edge.shim.engines.access import AccessError

    access, endpoints = await _engines(config)
    name = f"trial-{secrets.token_hex(8)}"
    num_engines = 0
    for endpoint in endpoints:
        try:
            metadata: Any = access.metadata()
            async with access.channel(endpoint) as channel:
                stub: Any = EngineStub(channel)
                request = pb.LoadAdapterRequest(name=name, model=base.weights, path=path)
                await stub.LoadAdapter(request, metadata=metadata, timeout=READ_S)
                await stub.UnloadAdapter(pb.UnloadAdapterRequest(name=name), metadata=metadata, timeout=READ_S)
                num_engines += 1
        except AccessError as error:
            raise CommandError(str(error)) from None
        except grpc.aio.AioRpcError as error:
            why = (error.details() or error.code().name).rstrip(".")
            if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
                raise CommandError(refused(config, endpoint, path, why)) from None
            if len(endpoints) > 1 or error.code() is not grpc.StatusCode.UNAVAILABLE:
                print(f"the engine {endpoint.address} was not asked: {why}", file=sys.stderr)
    return num_engines


def refused(config: Config, endpoint: Endpoint, path: str, why: str) -> str:
    """The engine's sentence; of one that can't see this machine's copies, with what to do."""
    if endpoint.is_unix or is_loopback(split_address(endpoint.address)[0]):
        return why
    said = f"the engine {endpoint.address}: {why}"
    if not AdapterCopies(config.adapter_copies).holds(path):
        return said
    return (
        f"{said}. Engines on other machines do not see what is copied here: put the directory on each of them under "
        "the same path, name a directory that holds it in [adapters] roots of every configuration, and add that path"
    )
