"""The keys that sign OAuth tokens, in the database: public halves as they are, private ones sealed. Synchronous.

One signs; a rotation retires it. A retired key verifies for as long as a token of its may live, and is then deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select, update

from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.rows import bump, milliseconds, now_ms, time_of, time_or_none
from aiexport_edge.shim.store.schema import signing_keys


@dataclass(frozen=True, slots=True)
class SigningKey:
    """One key. `verifies_until` is None while it signs."""

    key_id: str  # the tokens' `kid`
    created_at: datetime
    retired_at: datetime | None
    verifies_until: datetime | None
    public_key: bytes  # raw
    sealed_private_key: bytes


class SigningRows:
    """`kept` is how long a retired key goes on verifying."""

    def __init__(self, database: Engine, kept: timedelta) -> None:
        self._database = database
        self._kept = kept

    def list(self) -> list[SigningKey]:
        """Those that sign or verify, newest first."""
        query = select(signing_keys).order_by(signing_keys.c.created_at.desc(), signing_keys.c.id)
        with read(self._database) as connection:
            rows = connection.execute(query).mappings().all()
        return [self._key(row) for row in rows if not self._is_over(row, now_ms())]

    def rotate(self, make: Callable[[], tuple[bytes, bytes]], *, unless_newer_than: timedelta | None) -> SigningKey:
        """The key that signs from now on; `make` gives its raw public key and its sealed private one.

        With `unless_newer_than` nothing changes where the present one is younger: of many that find it old, one acts.
        """
        with write(self._database) as connection:
            bump(connection)  # first: it makes a second caller wait
            now = now_ms()
            query = select(signing_keys).where(signing_keys.c.retired_at.is_(None))
            current = connection.execute(query).mappings().first()
            if (
                current is not None
                and unless_newer_than is not None
                and current["created_at"] > now - milliseconds(unless_newer_than)
            ):
                return self._key(current)
            self._retire(connection, now)
            public_key, sealed = make()
            row = {
                "id": new_id("sig_"),
                "public_key": public_key,
                "sealed_private_key": sealed,
                "created_at": now,
                "retired_at": None,
            }
            connection.execute(insert(signing_keys).values(row))
        return self._key(row)

    def drop_retired(self) -> int:
        """Deletes every key that does not sign; returns how many."""
        with write(self._database) as connection:
            dropped = connection.execute(delete(signing_keys).where(signing_keys.c.retired_at.is_not(None))).rowcount
            bump(connection)
        return dropped

    def _retire(self, connection: Connection, now: int) -> None:
        connection.execute(update(signing_keys).where(signing_keys.c.retired_at.is_(None)).values(retired_at=now))
        connection.execute(delete(signing_keys).where(signing_keys.c.retired_at < now - milliseconds(self._kept)))

    def _is_over(self, row: Any, now: int) -> bool:
        return row["retired_at"] is not None and row["retired_at"] < now - milliseconds(self._kept)

    def _key(self, row: Any) -> SigningKey:
        retired_at = time_or_none(row["retired_at"])
        return SigningKey(
            key_id=row["id"],
            created_at=time_of(row["created_at"]),
            retired_at=retired_at,
            verifies_until=None if retired_at is None else retired_at + self._kept,
            public_key=row["public_key"],
            sealed_private_key=row["sealed_private_key"],
        )
