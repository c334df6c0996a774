"""What every command shares: its common options, its errors, and how results are printed.

Owns the exit codes' meaning (`CommandError` is 1) and the two forms of output: lines for a person, or with `--json` one
document on stdout and nothing else there. Knows no single command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from aiexport_edge.proto.config import Config
    from aiexport_edge.shim.store import Store

T = TypeVar("T")


class CommandError(Exception):
    """What a person can put right: one sentence with the remedy. The command ends with status 1."""


class Parser(argparse.ArgumentParser):
    """Options in full only, and examples in `--help` as written."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)


def common_options() -> Parser:
    """`--config` and `--state`, accepted before and after the command's name (the later one counts)."""
    options = Parser(add_help=False)
    options.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=argparse.SUPPRESS,
        help="configuration file (default: ./aiexport-edge.toml if it is there)",
    )
    options.add_argument(
        "--state",
        metavar="DIR",
        type=Path,
        default=argparse.SUPPRESS,
        help="state directory (default: the user's data directory)",
    )
    return options


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def actions_of(
    parser: argparse.ArgumentParser, command: str
) -> Callable[[str, str, str, Callable[[argparse.Namespace], int]], argparse.ArgumentParser]:
    """What adds an action to a command's parser: its name, its help, an example (what comes after the command's name)
    and what runs it. Every action takes the common options and `--json`.
    """
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    def action(
        name: str, help_text: str, example: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = actions.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=f"example:\n  aiexport-edge {command} {example}\n",
            parents=[common_options()],
        )
        json_option(sub)
        sub.set_defaults(run=run)
        return sub

    return action


def argument_type(parse: Callable[[str], T], name: str) -> Callable[[str], T]:
    """`parse` as an argparse type whose `ValueError` text reaches the person."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    convert.__name__ = name
    return convert


def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 65536):
        raise ValueError(f"must be a port from 1 to 65535, not {text!r}")
    return int(text)


def load_config(args: argparse.Namespace) -> Config:
    """The configuration that the command's options name. Raises `ConfigError`."""
    from aiexport_edge.proto import config

    return config.load(getattr(args, "config", None), getattr(args, "state", None))


def make_state(state: Path) -> None:
    """Makes the state directory, for this user alone, where it does not exist yet."""
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        state.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"the state directory {state} cannot be made ({error.strerror}); name another with --state"
        ) from None
    if not os.access(state, os.R_OK | os.W_OK | os.X_OK):
        raise CommandError(f"the state directory {state} cannot be written; give this user the right, or use --state")


@contextmanager
def opened_store(config: Config) -> Iterator[Store]:
    """The store of this installation, migrated. Its errors end the command with their sentence."""
    from sqlalchemy.exc import SQLAlchemyError

    from aiexport_edge.shim.store import StoreError, open_store
    from aiexport_edge.shim.store.errors import is_unavailable, remedy

    make_state(config.state)
    try:
        store = open_store(config.store.url)
        try:
            yield store
        finally:
            store.close()
    except StoreError as error:
        raise CommandError(str(error)) from None
    except SQLAlchemyError as error:
        if not is_unavailable(error):
            raise
        raise CommandError(f"the store can't be used just now: {remedy(error)}") from None


def plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, times as RFC 3339 in UTC, durations in seconds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return int(value.total_seconds())
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value


def print_json(document: Any) -> None:
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(plain(document), ensure_ascii=not is_unicode, indent=2))


def print_record(record: Mapping[str, Any]) -> None:
    """One thing, a line a field."""
    width = max(len(name) for name in record)
    for name, value in record.items():
        print(f"{name:<{width}}  {_cell(value)}")


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
    """Many things, a line each under a header; `empty` is for stderr where there are none."""
    if not rows:
        print(empty, file=sys.stderr)
        return
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    for line in ([column.upper() for column in columns], *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    value = plain(value)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(str(item) for item in value) or "-"
    return str(value)
