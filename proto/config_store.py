"""`[store]`: the database of workspaces, keys and usage, and for how long it keeps what clients sent."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.units import parse_duration

SQLITE = "sqlite"
POSTGRES = ("postgresql", "postgres", "postgresql+asyncpg", "postgresql+psycopg")


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """`url` is an SQLAlchemy URL; `retention`: how long prompts, results and single usage rows are kept."""

    url: str
    retention: timedelta


def default_url(state: Path) -> str:
    """The SQLite file of a state directory."""
    return f"{SQLITE}:///{state / 'store.db'}"


def read_store(table: Table, base: Path, state: Path) -> StoreConfig:
    store = StoreConfig(
        url=table.take("url", _url(base), default_url(state)),
        retention=table.take("retention", parse_duration, timedelta(days=29)),
    )
    table.end()
    return store


def _url(base: Path) -> Callable[[object], str]:
    """A relative file of SQLite counts from the configuration's folder, as every path of it does."""

    def parse(value: object) -> str:
        url = values.text(value)
        scheme, _, rest = url.partition("://")
        if scheme in POSTGRES:
            try:
                password = urlsplit(url).password
            except ValueError:
                raise ValueError("can't be read; write it as postgresql://user@host/database") from None
            if password is not None:  # not repeated
                raise ValueError("must hold no password; put it into libpq's ~/.pgpass, or into the file of PGPASSFILE")
            return url
        file = rest.removeprefix("/")
        if scheme != SQLITE or not rest.startswith("/") or file in ("", ":memory:"):
            said = f", not {scheme}://…" if re.fullmatch(r"[a-z0-9+]{1,40}", scheme) and rest else ""
            raise ValueError(f"must be sqlite:///FILE or postgresql://user@host/database{said}")
        return f"{SQLITE}:///{values.place(base, file)}"

    return parse
