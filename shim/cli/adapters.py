"""`aiexport-edge adapters`: the workspaces' fine-tuned models, which are low-rank adapters of the listed ones."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from aiexport_edge.shim.adapter_copies import AdapterCopies
from aiexport_edge.shim.cli import adapters_add
from aiexport_edge.shim.cli.command import actions_of, load_config, opened_store, plain, print_json, print_table

if TYPE_CHECKING:
    from aiexport_edge.shim.store.adapter_rows import AdapterRows

EPILOG = """\
example:
  aiexport-edge adapters add --workspace acme --base apex-sonnet-4-20250501 --id support /srv/adapters/support
  aiexport-edge adapters list --json
  aiexport-edge adapters remove ft-acme-support
"""

COLUMNS = ("full_id", "workspace", "base", "path", "created_at")


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    action = actions_of(parser, "adapters")

    adding = "add --workspace acme --base apex-sonnet-4-20250501 --id support /srv/adapters/support"
    add = action("add", "serve a PEFT directory as a workspace's own model", adding, adapters_add.run)
    add.add_argument("--workspace", metavar="NAME", required=True)
    add.add_argument("--base", metavar="MODEL_ID", required=True, help="the model that it was trained on")
    add.add_argument("--id", metavar="ID", required=True, help="the last part of ft-{workspace}-{ID}")
    add.add_argument(
        "directory", metavar="DIR", type=Path, help="as PEFT writes it; copied unless it is in [adapters] roots"
    )
    listing = action("list", "the fine-tuned models", "list --workspace acme", _list)
    listing.add_argument("--workspace", metavar="NAME", help="of this workspace alone")
    remove = action("remove", "serve one no more; what runs may finish", "remove ft-acme-support", _remove)
    remove.add_argument("full_id", metavar="FULL_ID")


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

    config = load_config(args)
    copies = AdapterCopies(config.adapter_copies)
    with opened_store(config) as store:
        rows = AdapterRows(store.database)
        removed = rows.remove(args.full_id)
        is_copy = copies.holds(removed.path)
        if is_copy and not asyncio.run(adapters_add.any_engine(config)):  # nobody runs with it, and no shim clears up
            _clear(copies, rows)
    if args.json:
        print_json({"full_id": removed.full_id, "removed": True})
    elif is_copy:
        print(f"removed {removed.full_id}; its copy goes once no request runs with it")
    else:
        print(f"removed {removed.full_id}; its directory {removed.path} is left as it is")
    return 0


def _clear(copies: AdapterCopies, rows: AdapterRows) -> None:
    try:
        with copies.locked(wait=True):
            for path in copies.besides({adapter.path for adapter in rows.list()}):
                copies.remove(path)
    except OSError as error:
        print(f"what is left in {copies.root} can't be removed ({error.strerror})", file=sys.stderr)
