"""`aiexport-edge workspaces`: whom the installation serves, on which plan."""

from __future__ import annotations

import argparse
from typing import Any

from aiexport_edge.proto.config import PLANS
from aiexport_edge.shim.cli.command import (
    common_options,
    json_option,
    load_config,
    opened_store,
    plain,
    print_json,
    print_record,
    print_table,
)

EPILOG = """\
example:
  aiexport-edge workspaces create acme --plan pro
  aiexport-edge workspaces set acme --plan enterprise
  aiexport-edge workspaces list --json
"""


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(name: str, help_text: str, example: str, run: Any) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = actions.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=f"example:\n  aiexport-edge workspaces {example}\n",
            parents=[common_options()],
        )
        json_option(sub)
        sub.set_defaults(run=run)
        return sub

    create = action("create", "make a workspace", "create acme --plan pro", _create)
    create.add_argument("name", metavar="NAME", help="lower-case letters, digits and _, at most 63")
    create.add_argument("--plan", choices=PLANS, required=True)
    action("list", "every workspace", "list --json", _list)
    show = action("show", "one workspace", "show acme", _show)
    show.add_argument("name", metavar="NAME")
    change = action("set", "change a workspace; what runs may finish", "set acme --plan free", _set)
    change.add_argument("name", metavar="NAME")
    change.add_argument("--plan", choices=PLANS, required=True)
    delete = action("delete", "delete a workspace and its keys; what runs may finish", "delete acme", _delete)
    delete.add_argument("name", metavar="NAME")


def _create(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        workspace = plain(store.create_workspace(args.name, args.plan))
    if args.json:
        print_json(workspace)
    else:
        print(f"made workspace {args.name} on plan {args.plan}; give it a key with:")
        print(f"aiexport-edge keys create --workspace {args.name}")
    return 0


def _list(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        workspaces = plain(store.list_workspaces())
    if args.json:
        print_json(workspaces)
    else:
        none = "there are no workspaces; make one with: aiexport-edge workspaces create NAME --plan pro"
        print_table(workspaces, ("name", "plan", "created_at"), none)
    return 0


def _show(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        workspace = plain(store.get_workspace(args.name))
    if args.json:
        print_json(workspace)
    else:
        print_record(workspace)
    return 0


def _set(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        workspace = plain(store.update_workspace(args.name, plan=args.plan))
    if args.json:
        print_json(workspace)
    else:
        print_record(workspace)
    return 0


def _delete(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        store.delete_workspace(args.name)
    if args.json:
        print_json({"name": args.name, "deleted": True})
    else:
        print(f"deleted workspace {args.name} and its keys")
    return 0
