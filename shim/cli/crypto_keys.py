"""`aiexport-edge signing-keys` and `master-key`: what signs OAuth tokens, what the store's secrets are sealed under."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from aiexport_edge.proto.config import Config
    from aiexport_edge.shim.auth.tokens import SigningKeys
    from aiexport_edge.shim.secrets import MasterKeys
    from aiexport_edge.shim.store import Store

SIGNING_EPILOG = """\
A key signs for 30 days and is then replaced by itself; tokens that it has signed stay good until they expire.

example:
  aiexport-edge signing-keys rotate
"""

MASTER_EPILOG = """\
Signing keys and webhook secrets are stored encrypted under the master key: the file master.key of the state
directory, made at first need, or the environment variable AIEXPORT_MASTER_KEY. Keep a copy of it apart from the
backups of the store: without it those secrets are lost, with it and the store they are read.

example:
  aiexport-edge master-key list
  aiexport-edge master-key rotate
"""


def add_arguments(name: str, parser: argparse.ArgumentParser) -> None:
    action = actions_of(parser, name)

    if name == "signing-keys":
        parser.epilog = SIGNING_EPILOG
        rotate = action("rotate", "sign with a new key; live tokens stay good", "rotate", _rotate_signing)
        rotate.add_argument(
            "--end-tokens", action="store_true", help="end all live tokens: the old key may be in other hands"
        )
        action("list", "the keys that sign or still verify", "list", _list_signing)
    else:
        parser.epilog = MASTER_EPILOG
        action("list", "the master keys here, and how much is sealed under each", "list", _list_master)
        action("rotate", "make a new master key and seal everything under it", "rotate", _rotate_master)
        action("reseal", "seal everything under the newest master key", "reseal", _reseal)
        action("prune", "drop the master keys under which nothing is sealed any more", "prune", _prune)


# ---------------------------------------------------------------------------------------------------- signing keys


def _signing(config: Config, store: Store) -> SigningKeys:
    from aiexport_edge.shim.auth.tokens import SigningKeys
    from aiexport_edge.shim.secrets import SecretBox

    return SigningKeys(store.database, SecretBox(_master(config, store)))


def _shown(key: Any) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "signs": key.retired_at is None,
        "created_at": plain(key.created_at),
        "retired_at": plain(key.retired_at),
        "verifies_until": plain(key.verifies_until),
    }


def _rotate_signing(args: argparse.Namespace) -> int:
    config = load_config(args)
    with opened_store(config) as store:
        keys = _signing(config, store)
        made = _shown(keys.rotate())
        ended = keys.drop_retired() if args.end_tokens else 0
    if args.json:
        print_json({**made, "dropped": ended})
    else:
        print_record(made)
        if args.end_tokens:
            print("all tokens issued before have ended")
    return 0


def _list_signing(args: argparse.Namespace) -> int:
    config = load_config(args)
    with opened_store(config) as store:
        keys = [_shown(key) for key in _signing(config, store).list()]
    if args.json:
        print_json(keys)
    else:
        none = "there are no signing keys yet; the first token makes one"
        print_table(keys, ("key_id", "signs", "created_at", "retired_at", "verifies_until"), none)
    return 0


# ---------------------------------------------------------------------------------------------------- master key


def _master(config: Config, store: Store) -> MasterKeys:
    from aiexport_edge.shim.secrets import MasterKeys
    from aiexport_edge.shim.store.sealed_rows import holds_secrets

    return MasterKeys(config.state, allow_new=lambda: not holds_secrets(store.database))


def missing_master_keys(config: Config, store: Store) -> list[str]:
    """The ids of master keys that something is sealed under and that are not here."""
    from aiexport_edge.shim.store.sealed_rows import count_by_master_key

    here = {key.id for key in _master(config, store).all()}
    return [key_id.hex() for key_id in count_by_master_key(store.database) if key_id not in here]


def _list_master(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.sealed_rows import count_by_master_key

    config = load_config(args)
    with opened_store(config) as store:
        keys = _master(config, store)
        counts = count_by_master_key(store.database)
        here = [key.id for key in keys.all()]
        where = "environment" if keys.in_environment else str(keys.file)
    rows: list[dict[str, Any]] = [
        {
            "id": key_id.hex(),
            "use": "seals" if key_id == here[0] else "opens",
            "sealed": counts[key_id],
            "where": where,
        }
        for key_id in here
    ]
    rows += [
        {"id": key_id.hex(), "use": "missing", "sealed": count, "where": None}
        for key_id, count in counts.items()
        if key_id not in here
    ]
    if args.json:
        print_json(rows)
    else:
        print_table(rows, ("id", "use", "sealed", "where"), "there is no master key yet; the first secret makes one")
    return 0


def _rotate_master(args: argparse.Namespace) -> int:
    config = load_config(args)
    with opened_store(config) as store:
        keys = _master(config, store)
        keys.rotate()
        return _sealed_anew(args, keys, store)


def _reseal(args: argparse.Namespace) -> int:
    config = load_config(args)
    with opened_store(config) as store:
        return _sealed_anew(args, _master(config, store), store)


def _sealed_anew(args: argparse.Namespace, keys: MasterKeys, store: Store) -> int:
    from aiexport_edge.shim.secrets import SecretBox
    from aiexport_edge.shim.store.sealed_rows import reseal

    resealed, lost = reseal(store.database, SecretBox(keys))
    newest = keys.newest().id.hex()
    if args.json:
        print_json({"id": newest, "resealed": resealed, "lost": lost})
    else:
        print(f"{resealed} secrets are now sealed under {newest}; back it up: {keys.file}")
    if lost:
        raise CommandError(
            f"{lost} secrets are sealed under a master key that is not here: restore that key, or make those secrets "
            "anew (aiexport-edge signing-keys rotate; aiexport-edge webhooks secret --workspace NAME --rotate)"
        )
    return 0


def _prune(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.sealed_rows import count_by_master_key

    config = load_config(args)
    with opened_store(config) as store:
        keys = _master(config, store)
        used = count_by_master_key(store.database)
        here = keys.all()
        kept = [key.id for key in here if key == here[0] or used[key.id]]
        if len(kept) < len(here):
            keys.keep(kept)
    if args.json:
        print_json({"kept": [key_id.hex() for key_id in kept], "dropped": len(here) - len(kept)})
    else:
        print(f"dropped {len(here) - len(kept)} master keys; backups of the store from before need them")
    return 0
