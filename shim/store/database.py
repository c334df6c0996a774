"""Opens the database: the SQLAlchemy engine with the settings each connection needs, and its schema brought up to date.

SQLite runs in WAL mode; write transactions begin as such (`BEGIN IMMEDIATE`), so that two processes wait for each other
instead of failing half-way. PostgreSQL is reached through psycopg, whatever driver a URL names: all of the store's code
is synchronous and runs on threads, where one transaction writes what many requests have brought, so that an
asynchronous driver would have nothing to wait for. Alembic is imported only when a migration has to run. Knows no
query of the product.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from aiexport_edge.proto.config_store import POSTGRES
from aiexport_edge.shim.store.errors import StoreError, WrongSchema, remedy
from aiexport_edge.shim.store.schema import REVISION

BUSY_TIMEOUT_MS = 5_000
_POSTGRES_CONNECT = {
    "connect_timeout": 5,
    "application_name": "aiexport-edge",
    # A lock that nobody gives back, or a peer that is gone, is an error after a while, not a wait for ever.
    "options": f"-c lock_timeout={BUSY_TIMEOUT_MS} -c statement_timeout=60000 -c timezone=UTC",
    "keepalives_idle": 30,
    "tcp_user_timeout": 20_000,
}
_SQLITE_PATH_LIMIT = 500  # bytes; its MAX_PATHNAME is 512, with the endings of the files beside it
_MIGRATION_LOCK = 0x61786564  # any number that no other program locks


def open_database(url: str) -> Engine:
    """The engine for `url`, its schema current. Raises `StoreError`.

    A SQLite file is made with mode 0600, its directory with 0700.
    """
    try:
        parsed = store_url(url)
        file = None
        if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
            file = Path(str(parsed.database))
            if len(os.fsencode(file.absolute())) > _SQLITE_PATH_LIMIT:
                raise StoreError(
                    f"The path of the store, {file}, is longer than SQLite's {_SQLITE_PATH_LIMIT} bytes; "
                    "name a shorter --state or [store] url."
                )
            _make_private(file)
        if parsed.get_backend_name() == "postgresql":
            engine = create_engine(parsed, hide_parameters=True, pool_pre_ping=True, connect_args=_POSTGRES_CONNECT)
        else:
            engine = create_engine(parsed, hide_parameters=True)  # prompts and hashes are no part of an error
    except ModuleNotFoundError as error:
        if error.name != "psycopg":
            raise StoreError(f"The store's URL can't be used: {error}. Correct [store] url.") from None
        raise StoreError(
            "PostgreSQL as the store needs its driver; run in the project's folder: pip install '.[postgres]'"
        ) from None
    except (ArgumentError, NoSuchModuleError) as error:
        raise StoreError(f"The store's URL can't be used: {error}. Correct [store] url.") from None
    except OSError as error:
        raise StoreError(f"The store can't be made: {error.strerror} ({error.filename}).") from None
    if parsed.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        if _revision(engine) != REVISION:
            with _migration_lock(file):
                _migrate(engine)
    except DBAPIError as error:
        engine.dispose()
        raise StoreError(f"The store can't be opened: {remedy(error)}.") from None
    except StoreError:
        engine.dispose()
        raise
    return engine


@contextmanager
def write(engine: Engine, *, synchronous: str = "FULL") -> Iterator[Connection]:
    """A transaction that writes; committed at its end.

    `synchronous` is SQLite's: FULL survives a power cut, NORMAL the death of any process and is much cheaper.
    """
    with engine.connect() as connection:
        connection = connection.execution_options(aiexport_synchronous=synchronous)
        with connection.begin():
            yield connection


@contextmanager
def read(engine: Engine) -> Iterator[Connection]:
    """A consistent view of the database."""
    with engine.connect() as connection:
        yield connection


def store_url(url: str) -> URL:
    """`url` as SQLAlchemy is to read it: every spelling of PostgreSQL with the one driver that is used.

    Raises `ArgumentError`, or `StoreError` for another database.
    """
    parsed = make_url(url)
    if parsed.drivername in POSTGRES:
        query = dict(parsed.query)
        if "ssl" in query:  # asyncpg's name for libpq's
            query.setdefault("sslmode", query.pop("ssl"))
        return parsed.set(drivername="postgresql+psycopg", query=query)
    if parsed.get_backend_name() != "sqlite":
        raise StoreError(
            f"The store can't be a {parsed.drivername} database; use sqlite:///FILE or postgresql+asyncpg://…"
        )
    return parsed


def _make_private(file: Path) -> None:
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if stat.S_IMODE(os.fstat(descriptor).st_mode) & 0o077:
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def lock_migrations(connection: Connection) -> None:
    """Until the transaction's end no other process migrates this database."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SET LOCAL lock_timeout = 0"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": _MIGRATION_LOCK})


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transaction of its own: `_begin_sqlite` does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA cache_size = -2000")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    synchronous = connection.get_execution_options().get("aiexport_synchronous")
    if synchronous is not None:
        connection.exec_driver_sql(f"PRAGMA synchronous = {synchronous}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if synchronous is not None else "BEGIN")


def _revision(engine: Engine) -> str | None:
    with read(engine) as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        return None if revision is None else str(revision)


@contextmanager
def _migration_lock(file: Path | None) -> Iterator[None]:
    """One process migrates a SQLite file at a time; PostgreSQL is locked in the migration's own transaction."""
    if file is None:
        yield
        return
    import fcntl

    descriptor = os.open(file.with_name(file.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    config.attributes["engine"] = engine
    current = _revision(engine)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise WrongSchema(
            f"The store was made by a newer version of this program (its schema is {current}, the newest known here is "
            f"{REVISION}). Use that version, or another state directory."
        )
    command.upgrade(config, "head")
