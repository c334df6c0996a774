"""`aiexport-edge batches`: what clients have handed in, how far it is, and an end to it."""

from __future__ import annotations

import argparse
from typing import Any

from aiexport_edge.shim.cli.command import (
    actions_of,
    load_config,
    opened_store,
    print_json,
    print_record,
    print_table,
)

EPILOG = """\
example:
  aiexport-edge batches list --workspace acme
  aiexport-edge batches cancel batch_…
"""

LISTED = 1000


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    action = actions_of(parser, "batches")

    listing = action("list", f"the newest {LISTED:,} batches", "list --workspace acme --json", _list)
    listing.add_argument("--workspace", metavar="NAME", help="its batches alone (default: everybody's)")
    show = action("show", "one batch", "show batch_…", _show)
    cancel = action("cancel", "end a batch; what has finished keeps its results", "cancel batch_…", _cancel)
    delete = action("delete", "delete a batch and its results; what runs may finish", "delete batch_…", _delete)
    for sub in (show, cancel, delete):
        sub.add_argument("id", metavar="ID")


def _list(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.batch_rows import BatchRows

    with opened_store(load_config(args)) as store:
        found = BatchRows(store.database).of_workspace(args.workspace, limit=LISTED)
    documents = [_document(batch) for batch in found]
    if args.json:
        print_json(documents)
    else:
        rows = [document | {"requests": _counts(document)} for document in documents]
        print_table(rows, ("id", "workspace", "status", "requests", "created_at"), "there are no batches")
    return 0


def _show(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.batch_rows import BatchRows

    with opened_store(load_config(args)) as store:
        _print(_document(BatchRows(store.database).get(args.id, None)), args)
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.batch_rows import BatchRows

    with opened_store(load_config(args)) as store:
        _print(_document(BatchRows(store.database).cancel(args.id, None)), args)
    return 0


def _delete(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.store.batch_rows import BatchRows

    with opened_store(load_config(args)) as store:
        BatchRows(store.database).delete(args.id)
    if args.json:
        print_json({"id": args.id, "deleted": True})
    else:
        print(f"deleted {args.id} and its results")
    return 0


def _document(batch: Any) -> dict[str, Any]:
    """The API's object, with the workspace's name, which only the operator sees."""
    document: dict[str, Any] = batch.document()
    return {"id": document["id"], "workspace": batch.workspace, **document}


def _counts(document: dict[str, Any]) -> str:
    counts = document["request_counts"]
    ended = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "total" and count)
    return f"{counts['total']} ({ended})"


def _print(document: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print_json(document)
    else:
        print_record(document | {"request_counts": _counts(document)})
