"""`aiexport-edge usage`: what workspaces have used, by model, key or day."""

from __future__ import annotations

import argparse
from typing import Any

from aiexport_edge.shim.cli.command import (
    CommandError,
    argument_type,
    json_option,
    load_config,
    opened_store,
    print_table,
)

EPILOG = """\
example:
  aiexport-edge usage --workspace acme --start 2025-04-01 --end 2025-04-30 --by model
"""

_COLUMNS = ("requests", "input_tokens", "cache_read_input_tokens", "output_tokens", "cost_usd")


def add_arguments(_name: str, parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("--workspace", metavar="NAME", help="one workspace (default: all together)")
    day = argument_type(_day, "day")
    parser.add_argument("--start", metavar="D", type=day, help="the first day of UTC (default: 30 days up to the last)")
    parser.add_argument("--end", metavar="D", type=day, help="the last day of UTC (default: today)")
    parser.add_argument("--by", choices=("model", "key", "day"), help="a line for each")
    json_option(parser)
    parser.set_defaults(run=run)


def _day(text: str) -> str:
    """Raises `ValueError` for what is no date."""
    from aiexport_edge.shim.usage_report import Period

    Period.parse(None, text)
    return text


def run(args: argparse.Namespace) -> int:
    from aiexport_edge.shim.usage_report import BadPeriod, Period, report

    try:
        period = Period.parse(args.start, args.end)
    except BadPeriod as bad:
        raise CommandError(f"--{bad.field} {bad}") from None
    with opened_store(load_config(args)) as store:
        workspace_id = None if args.workspace is None else store.get_workspace(args.workspace).id
        document = report(store.database, period, workspace_id=workspace_id, group_by=args.by)
    if args.json:
        _print_json(document)
        return 0
    print(f"{document['start']} to {document['end']}, in UTC")
    total = {"group": "total", **document["total"]}
    rows = [{name: str(value) for name, value in row.items()} for row in [*document.get("data", ()), total]]
    print_table(rows, ("group", *_COLUMNS), "")
    return 0


def _print_json(document: dict[str, Any]) -> None:
    """With the costs as they are: a binary fraction would be next to them."""
    import msgspec

    encoded = msgspec.json.Encoder(decimal_format="number").encode(document)
    print(msgspec.json.format(encoded, indent=2).decode())
