"""`aiexport-edge workspaces`: whom the installation serves, on which plan."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiexport_edge.proto.config_limits import MAX_REQUESTS_PER_MINUTE, MAX_TOKENS_PER_DAY, PLANS, UNLIMITED
from aiexport_edge.shim.cli.command import (
    CommandError,
    actions_of,
    argument_type,
    load_config,
    opened_store,
    plain,
    print_json,
    print_record,
    print_table,
)

if TYPE_CHECKING:
    from aiexport_edge.shim.store import Workspace
    from aiexport_edge.shim.store.store import WorkspaceChanges

_PLANS_OWN = "plan"

EPILOG = """\
example:
  aiexport-edge workspaces create acme --plan pro
  aiexport-edge workspaces set acme --plan enterprise --requests-per-minute 3000
  aiexport-edge workspaces list --json
"""


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    action = actions_of(parser, "workspaces")

    create = action("create", "make a workspace", "create acme --plan pro", _create)
    create.add_argument("name", metavar="NAME", help="lower-case letters, digits and _, at most 63")
    create.add_argument("--plan", choices=PLANS, required=True)
    _limits(create)
    action("list", "every workspace", "list --json", _list)
    show = action("show", "one workspace", "show acme", _show)
    show.add_argument("name", metavar="NAME")
    change = action("set", "change a workspace; what runs may finish", "set acme --plan free", _set)
    change.add_argument("name", metavar="NAME")
    change.add_argument("--plan", choices=PLANS)
    _limits(change)
    delete = action("delete", "delete a workspace and its keys; what runs may finish", "delete acme", _delete)
    delete.add_argument("name", metavar="NAME")


def _limits(parser: argparse.ArgumentParser) -> None:
    requests = argument_type(_limit(MAX_REQUESTS_PER_MINUTE), "limit")
    tokens = argument_type(_limit(MAX_TOKENS_PER_DAY), "limit")
    text = f'{{}} of this workspace: a number, "{UNLIMITED}", or "plan" for the plan\'s (the default)'
    parser.add_argument("--requests-per-minute", metavar="N", type=requests, help=text.format("requests a minute"))
    parser.add_argument("--tokens-per-day", metavar="N", type=tokens, help=text.format("tokens a day"))


def _limit(high: int) -> Callable[[str], str | int]:
    def parse(text: str) -> str | int:
        if text in (UNLIMITED, _PLANS_OWN):
            return text
        if not (text.isascii() and text.isdigit() and len(text) <= 18 and 0 < int(text) <= high):
            raise ValueError(f'must be a number from 1 to {high}, "{UNLIMITED}" or "{_PLANS_OWN}", not {text!r}')
        return int(text)

    return parse


def _stored(limit: str | int | None) -> int | None:
    """As the store has it: null is the plan's, 0 none."""
    return 0 if limit == UNLIMITED else limit if isinstance(limit, int) else None


def _shown(workspace: Workspace) -> dict[str, Any]:
    record: dict[str, Any] = plain(workspace)
    for name in ("requests_per_minute", "tokens_per_day"):
        record[name] = UNLIMITED if record[name] == 0 else record[name]
    return record


def _create(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        made = store.create_workspace(
            args.name,
            args.plan,
            requests_per_minute=_stored(args.requests_per_minute),
            tokens_per_day=_stored(args.tokens_per_day),
        )
    workspace = _shown(made)
    if args.json:
        print_json(workspace)
    else:
        print(f"made workspace {args.name} on plan {args.plan}; give it a key with:")
        print(f"aiexport-edge keys create --workspace {args.name}{_places(args)}")
    return 0


def _places(args: argparse.Namespace) -> str:
    """The options that say which installation is meant, for a line to paste."""
    named = ((name, getattr(args, name, None)) for name in ("config", "state"))
    return "".join(f" --{name} {shlex.quote(str(path))}" for name, path in named if path is not None)


def _list(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        workspaces = [_shown(workspace) for workspace in store.list_workspaces()]
    if args.json:
        print_json(workspaces)
    else:
        none = "there are no workspaces; make one with: aiexport-edge workspaces create NAME --plan pro"
        print_table(workspaces, ("name", "plan", "created_at", "requests_per_minute", "tokens_per_day"), none)
    return 0


def _show(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        workspace = _shown(store.get_workspace(args.name))
    if args.json:
        print_json(workspace)
    else:
        print_record(workspace)
    return 0


def _set(args: argparse.Namespace) -> int:
    changes: WorkspaceChanges = {}
    if args.plan is not None:
        changes["plan"] = args.plan
    if args.requests_per_minute is not None:
        changes["requests_per_minute"] = _stored(args.requests_per_minute)
    if args.tokens_per_day is not None:
        changes["tokens_per_day"] = _stored(args.tokens_per_day)
    if not changes:
        raise CommandError("nothing to change; give --plan, --requests-per-minute or --tokens-per-day")
    with opened_store(load_config(args)) as store:
        workspace = _shown(store.update_workspace(args.name, **changes))
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
