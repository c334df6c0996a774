"""`aiexport-edge keys`: the API keys of a workspace. A key is shown once, when it is made."""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from typing import Any

from aiexport_edge.proto.units import parse_duration
from aiexport_edge.shim.cli.command import (
    actions_of,
    argument_type,
    load_config,
    opened_store,
    plain,
    print_json,
    print_record,
    print_table,
)

EPILOG = """\
example:
  aiexport-edge keys create --workspace acme --expires 90d
  aiexport-edge keys list --workspace acme --json
"""

ONCE = "the key is shown only now; keep it where your program reads it"


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    action = actions_of(parser, "keys")
    duration = argument_type(parse_duration, "duration")

    create = action("create", "make a key and show it once", "create --workspace acme --expires 90d", _create)
    create.add_argument("--workspace", metavar="NAME", required=True)
    create.add_argument(
        "--scope",
        metavar="S",
        action="append",
        help="messages, batch, usage or keys; may be repeated (default: the first three)",
    )
    create.add_argument("--expires", metavar="90d", type=duration, help="how long it lives (default: until revoked)")
    create.add_argument("--test", action="store_true", help="mark it as a test key (axp_test_…)")
    listing = action("list", "the keys of a workspace", "list --workspace acme", _list)
    listing.add_argument("--workspace", metavar="NAME", required=True)
    rotate = action("rotate", "make a new key; the old one lives on for a while", "rotate key_… --grace 24h", _rotate)
    rotate.add_argument("key_id", metavar="KEY_ID")
    rotate.add_argument(
        "--grace",
        metavar="24h",
        type=duration,
        default=timedelta(hours=24),
        help="how long the old key goes on working (default: 24h)",
    )
    revoke = action("revoke", "end a key at once", "revoke key_…", _revoke)
    revoke.add_argument("key_id", metavar="KEY_ID")


def _show_key(created: Any, as_json: bool) -> None:
    if as_json:
        print_json(created)
    else:
        print_record(created)
        print(ONCE, file=sys.stderr)


def _create(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        created = plain(store.create_key(args.workspace, scopes=args.scope, expires_in=args.expires, test=args.test))
    _show_key(created, args.json)
    return 0


def _list(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        keys = plain(store.list_keys(args.workspace))
    if args.json:
        print_json(keys)
    else:
        none = f"{args.workspace} has no keys; make one with: aiexport-edge keys create --workspace {args.workspace}"
        print_table(keys, tuple(keys[0]) if keys else (), none)
    return 0


def _rotate(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        rotated = plain(store.rotate_key(args.key_id, args.grace))
    _show_key(rotated, args.json)
    return 0


def _revoke(args: argparse.Namespace) -> int:
    with opened_store(load_config(args)) as store:
        store.revoke_key(args.key_id)
    if args.json:
        print_json({"key_id": args.key_id, "revoked": True})
    else:
        print(f"revoked {args.key_id}")
    return 0
