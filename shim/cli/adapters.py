"""`aiexport-edge adapters`: the workspaces' fine-tuned models, which are low-rank adapters of the listed ones."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import secrets
import sys
from pathlib import Path
from typing import Any

from aiexport_edge.proto.config import Config, ModelSpec
from aiexport_edge.proto.config_values import CUSTOM
from aiexport_edge.shim.cli.command import (
    CommandError,
    actions_of,
    load_config,
    opened_store,
    plain,
    print_json,
    print_record,
    print_table,
)

EPILOG = """\
example:
  aiexport-edge adapters add --workspace acme --base apex-sonnet-4-20250501 --id support /srv/adapters/support
  aiexport-edge adapters list --json
  aiexport-edge adapters remove ft-acme-support
"""

READ_S = 120.0  # for an engine to read every byte of an adapter's files
COLUMNS = ("full_id", "workspace", "base", "path", "created_at")


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    action = actions_of(parser, "adapters")

    adding = "add --workspace acme --base apex-sonnet-4-20250501 --id support /srv/adapters/support"
    add = action("add", "serve a PEFT directory as a workspace's own model", adding, _add)
    add.add_argument("--workspace", metavar="NAME", required=True)
    add.add_argument("--base", metavar="MODEL_ID", required=True, help="the model that it was trained on")
    add.add_argument("--id", metavar="ID", required=True, help="the last part of ft-{workspace}-{ID}")
    add.add_argument("directory", metavar="DIR", type=Path, help="below one of [adapters] roots, on every engine")
    listing = action("list", "the fine-tuned models", "list --workspace acme", _list)
    listing.add_argument("--workspace", metavar="NAME", help="of this workspace alone")
    remove = action("remove", "serve one no more; what runs may finish", "remove ft-acme-support", _remove)
    remove.add_argument("full_id", metavar="FULL_ID")


def _add(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.adapter_rows import AdapterRows

    config = load_config(args)
    if not config.adapters.roots:
        raise CommandError("no adapters are served here; name the directories that hold them in [adapters] roots")
    base_id, base = _base(config, args.base)
    path = os.path.abspath(args.directory.expanduser())
    with opened_store(config) as store:
        workspace = store.get_workspace(args.workspace)
        num_engines = asyncio.run(_try(config, base, path))
        if not num_engines:
            _look(config, Path(path))
        adapter = AdapterRows(store.database).add(args.workspace, args.id, base=base_id, path=path)
    if args.json:
        print_json(adapter)
    else:
        print_record(plain(adapter))
    if not num_engines:
        print("no engine answers just now: it is read, and checked, when one starts", file=sys.stderr)
    if CUSTOM not in config.plans[workspace.plan].families:
        print(
            f"the plan {workspace.plan} has no fine-tuned models, so {workspace.name} can't use it yet; change it: "
            f"aiexport-edge workspaces set {workspace.name} --plan enterprise",
            file=sys.stderr,
        )
    return 0


def _list(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.adapter_rows import AdapterRows

    with opened_store(load_config(args)) as store:
        adapters = plain(AdapterRows(store.database).list(args.workspace))
    if args.json:
        print_json(adapters)
    else:
        print_table(adapters, COLUMNS, "there are no fine-tuned models; add one with: aiexport-edge adapters add")
    return 0


def _remove(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.adapter_rows import AdapterRows

    with opened_store(load_config(args)) as store:
        removed = AdapterRows(store.database).remove(args.full_id)
    if args.json:
        print_json({"full_id": removed.full_id, "removed": True})
    else:
        print(f"removed {removed.full_id}; its directory {removed.path} is left as it is")
    return 0


def _base(config: Config, wanted: str) -> tuple[str, ModelSpec]:
    """The listed model that is meant, by an id or by one without its date."""
    form = re.compile(re.escape(wanted) + r"(-\d{8})?", re.ASCII)
    found = [(model_id, spec) for spec in config.models for model_id in spec.ids if form.fullmatch(model_id)]
    if not found:
        ids = ", ".join(model_id for spec in config.models for model_id in spec.ids)
        raise CommandError(f"there is no model {wanted}; choose one of {ids}")
    return max(found, key=lambda each: (each[0] == wanted, each[0]))


def _look(config: Config, path: Path) -> None:
    """Without an engine, what can be seen from here, if the engines' files are here."""
    if config.shim.engines:
        return
    if not (path / "adapter_config.json").is_file():
        raise CommandError(f"{path} holds no adapter_config.json; name the directory that PEFT's save_pretrained wrote")
    if not any(path.resolve().is_relative_to(root.resolve()) for root in config.adapters.roots):
        roots = ", ".join(map(str, config.adapters.roots))
        raise CommandError(f"{path} lies in none of [adapters] roots ({roots}); move it there, or add its directory")


async def _try(config: Config, base: ModelSpec, path: str) -> int:
    """Has every engine that answers read and check the adapter; how many did. Raises `CommandError` for a refusal."""
    import grpc
    import grpc.aio

    from aiexport_edge.proto import engine_pb2 as pb
    from aiexport_edge.proto.engine_pb2_grpc import EngineStub
    from aiexport_edge.shim.cli.status import engine_targets
    from aiexport_edge.shim.engines.access import AccessError, EngineAccess, split_targets

    shim = config.shim
    access = EngineAccess(shim.engine_ca, shim.engine_cert, shim.engine_key, shim.engine_token_file)
    name = f"trial-{secrets.token_hex(8)}"
    num_engines = 0
    for endpoint in split_targets(engine_targets(config))[0]:
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
            if error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND):
                raise CommandError((error.details() or "the engine refuses it").rstrip(".")) from None
    return num_engines
