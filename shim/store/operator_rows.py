"""The operator's login in the database: one row or none, the password as its hash. Synchronous."""

from __future__ import annotations

from sqlalchemy import Engine, delete, insert, select

from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.rows import now_ms
from aiexport_edge.shim.store.schema import operator_login


class OperatorLogin:
    """The one row. Each method is a transaction."""

    def __init__(self, database: Engine) -> None:
        self._database = database

    def password_hash(self) -> str | None:
        """None where no password is set."""
        with read(self._database) as connection:
            found: str | None = connection.execute(select(operator_login.c.password_hash)).scalar_one_or_none()
        return found

    def set(self, password_hash: str) -> None:
        with write(self._database) as connection:
            connection.execute(delete(operator_login))
            connection.execute(insert(operator_login).values(id=1, password_hash=password_hash, changed_at=now_ms()))

    def remove(self) -> None:
        with write(self._database) as connection:
            connection.execute(delete(operator_login))
