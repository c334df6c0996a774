"""What can go wrong with the store, each a sentence for a person that says what to do."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout


class StoreError(Exception):
    """The store cannot do what was asked."""


class Missing(StoreError):
    """No such workspace or key."""


class NameTaken(StoreError):
    """A workspace of that name exists."""


class InvalidValue(StoreError):
    """A name, plan, scope or limit that can't be."""


class NotAllowed(StoreError):
    """More than who asks may give."""


class TooMany(StoreError):
    """There are as many of these as there may be."""


class WrongSchema(StoreError):
    """The database was made by another version of the product."""


_REMEDIES = {
    sqlite3.SQLITE_FULL: "the disk of the store is full; free space on it, or move [store] url to a larger one",
    sqlite3.SQLITE_BUSY: "another program holds the store's lock; end it (a backup, a database shell)",
    sqlite3.SQLITE_LOCKED: "another program holds the store's lock; end it (a backup, a database shell)",
    sqlite3.SQLITE_READONLY: "the store's file can't be written; mount its disk writable and give this user the right",
    sqlite3.SQLITE_IOERR: "the disk of the store fails or is full; see the system's log, check its free space",
    sqlite3.SQLITE_CANTOPEN: "the store's file can't be opened; check that its directory is there and writable",
    sqlite3.SQLITE_CORRUPT: "the store's file is damaged; restore it from a backup",
    sqlite3.SQLITE_NOTADB: "the store's file is no database; restore it from a backup, or name another",
}


def remedy(error: SQLAlchemyError) -> str:
    """What went wrong and what to do about it, for the operator's log: no statement, no parameters."""
    reason = getattr(error, "orig", None) or error
    code = getattr(reason, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _REMEDIES:  # the low byte is the primary code
        return f"{reason}: {_REMEDIES[code & 0xFF]}"
    sentence = str(reason).strip().partition("\n")[0]
    if isinstance(error, OperationalError | InterfaceError) and code is None:
        return f"{sentence}: check that the database server runs, has room and can be reached from here"
    return sentence


def is_unavailable(error: SQLAlchemyError) -> bool:
    """Whether the store can't serve just now through no fault of the request: full, locked, away."""
    return isinstance(error, OperationalError | InterfaceError | PoolTimeout) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )
