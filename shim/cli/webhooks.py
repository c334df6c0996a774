"""`aiexport-edge webhooks`: the secrets that sign them, what has been delivered and what has not."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from aiexport_edge.shim.cli.command import (
    actions_of,
    load_config,
    opened_store,
    plain,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from aiexport_edge.proto.config import Config
    from aiexport_edge.shim.store import Store
    from aiexport_edge.shim.store.webhook_rows import WebhookRows

EPILOG = """\
example:
  aiexport-edge webhooks secret --workspace acme
  aiexport-edge webhooks list --dead
"""


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    action = actions_of(parser, "webhooks")

    secret = action("secret", "the secret that signs a workspace's webhooks", "secret --workspace acme", _secret)
    secret.add_argument("--workspace", metavar="NAME", required=True)
    secret.add_argument(
        "--rotate", action="store_true", help="make a new one; for 24 hours webhooks are signed with both"
    )
    listing = action("list", "the newest 1,000 deliveries", "list --dead --json", _list)
    listing.add_argument("--dead", action="store_true", help="those alone that were given up after 72 hours")
    again = action("redeliver", "send a webhook again, under the same webhook-id", "redeliver evt_…", _redeliver)
    again.add_argument("id", metavar="ID")


def _rows(config: Config, store: Store) -> WebhookRows:
    from aiexport_edge.shim.secrets import MasterKeys, SecretBox
    from aiexport_edge.shim.store.sealed_rows import holds_secrets
    from aiexport_edge.shim.store.webhook_rows import WebhookRows

    keys = MasterKeys(config.state, allow_new=lambda: not holds_secrets(store.database))
    return WebhookRows(store.database, SecretBox(keys))


def _secret(args: argparse.Namespace) -> int:
    config = load_config(args)
    with opened_store(config) as store:
        secret = _rows(config, store).secret(args.workspace, rotate=args.rotate)
    if args.json:
        print_json({"secret": secret})
    else:
        print(secret)
        if args.rotate:
            print("for 24 hours webhooks carry signatures of this and of the old secret", file=sys.stderr)
    return 0


def _list(args: argparse.Namespace) -> int:
    config = load_config(args)
    with opened_store(config) as store:
        deliveries = plain(_rows(config, store).deliveries(dead=args.dead))
    if args.json:
        print_json(deliveries)
    else:
        columns = ("id", "workspace", "batch_id", "state", "attempts", "url", "last_error")
        print_table(deliveries, columns, "no webhook has been given up" if args.dead else "there are no webhooks")
    return 0


def _redeliver(args: argparse.Namespace) -> int:
    config = load_config(args)
    with opened_store(config) as store:
        _rows(config, store).redeliver(args.id)
    if args.json:
        print_json({"id": args.id, "state": "pending"})
    else:
        print(f"{args.id} is sent again now")
    return 0
