"""`aiexport-edge oauth-clients`: programs that get short-lived tokens instead of holding an API key."""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta

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
  aiexport-edge oauth-clients create --workspace acme
  aiexport-edge oauth-clients list --json
"""

ONCE = "the secret is shown only now; keep it where your program reads it"
COLUMNS = ("client_id", "workspace", "scopes", "created_at", "old_secret_expires_at", "revoked_at")


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    action = actions_of(parser, "oauth-clients")
    duration = argument_type(parse_duration, "duration")

    create = action("create", "make a client and show its secret once", "create --workspace acme", _create)
    create.add_argument("--workspace", metavar="NAME", required=True)
    create.add_argument(
        "--scope",
        metavar="S",
        action="append",
        help="messages, batch, usage or keys; may be repeated (default: the first three)",
    )
    listing = action("list", "the clients of all workspaces, or of one", "list --workspace acme", _list)
    listing.add_argument("--workspace", metavar="NAME")
    rotate = action(
        "rotate-secret",
        "make a new secret; the old one works for a while, tokens go on",
        "rotate-secret client_… --grace 24h",
        _rotate,
    )
    rotate.add_argument("client_id", metavar="CLIENT_ID")
    rotate.add_argument(
        "--grace",
        metavar="24h",
        type=duration,
        default=timedelta(hours=24),
        help="how long the old secret goes on working (default: 24h)",
    )
    revoke = action("revoke", "end a client and its tokens at once", "revoke client_…", _revoke)
    revoke.add_argument("client_id", metavar="CLIENT_ID")


def _create(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.oauth_rows import OAuthClients

    with opened_store(load_config(args)) as store:
        created = OAuthClients(store.database).create(args.workspace, scopes=args.scope)
        plan = store.get_workspace(args.workspace).plan
    if args.json:
        print_json({"client_id": created.client_id, "client_secret": created.client_secret})
    else:
        print_record(plain(created))
        print(ONCE, file=sys.stderr)
    if plan != "enterprise":
        print(
            f"{args.workspace} is on plan {plan}: it gets tokens once it is on enterprise "
            f"(aiexport-edge workspaces set {args.workspace} --plan enterprise)",
            file=sys.stderr,
        )
    return 0


def _list(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.oauth_rows import OAuthClients

    with opened_store(load_config(args)) as store:
        if args.workspace is not None:
            store.get_workspace(args.workspace)
        clients = plain(OAuthClients(store.database).list(args.workspace))
    if args.json:
        print_json(clients)
    else:
        none = "there are no OAuth clients; make one with: aiexport-edge oauth-clients create --workspace NAME"
        print_table(clients, COLUMNS, none)
    return 0


def _rotate(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.oauth_rows import OAuthClients

    with opened_store(load_config(args)) as store:
        rotated = OAuthClients(store.database).rotate_secret(args.client_id, args.grace)
    if args.json:
        print_json(rotated)
    else:
        print_record(plain(rotated))
        print(ONCE, file=sys.stderr)
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.oauth_rows import OAuthClients

    with opened_store(load_config(args)) as store:
        OAuthClients(store.database).revoke(args.client_id)
    if args.json:
        print_json({"client_id": args.client_id, "revoked": True})
    else:
        print(f"revoked {args.client_id} and its tokens")
    return 0
