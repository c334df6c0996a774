"""Workspaces and keys in the database. Synchronous: callers on an event loop use a thread.

Every change bumps the generation, which running processes poll; so a revoked key is refused by all of them within a
second. Usage rows are `usage_rows.py`'s.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.exc import IntegrityError

from aiexport_edge.shim.store.database import open_database, read, write
from aiexport_edge.shim.store.errors import InvalidValue, Missing, NameTaken
from aiexport_edge.shim.store.keys import DEFAULT_SCOPES, SCOPES, hash_key, new_id, new_key
from aiexport_edge.shim.store.schema import generation, keys, workspaces
from aiexport_edge.shim.store.values import CreatedKey, Key, Principal, RotatedKey, Workspace

PLANS = ("free", "pro", "enterprise")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,62}", re.ASCII)


def open_store(url: str) -> Store:
    """The store at an SQLAlchemy URL, migrated to this version's schema. Raises `StoreError`."""
    return Store(open_database(url))


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Store:
    """Owns the connection pool. Every method is one transaction, and raises `StoreError` with a sentence."""

    def __init__(self, database: Engine) -> None:
        self.database = database

    def close(self) -> None:
        self.database.dispose()

    # ------------------------------------------------------------------------------------------ workspaces

    def create_workspace(self, name: str, plan: str) -> Workspace:
        if not _NAME.fullmatch(name):
            raise InvalidValue(
                f"{name!r} can't be a workspace's name; use lower-case letters, digits and _, at most 63, not _ first."
            )
        _check_plan(plan)
        row = {"id": new_id("ws_"), "name": name, "plan": plan, "created_at": now_ms()}
        try:
            with write(self.database) as connection:
                connection.execute(insert(workspaces).values(**row, cache_salt=secrets.token_bytes(16)))
                _bump(connection)
        except IntegrityError:
            raise NameTaken(f"There is a workspace named {name} already; choose another name.") from None
        return _workspace(row)

    def list_workspaces(self) -> list[Workspace]:
        """By name."""
        query = select(workspaces).where(workspaces.c.deleted_at.is_(None)).order_by(workspaces.c.name)
        with read(self.database) as connection:
            return [_workspace(row) for row in connection.execute(query).mappings()]

    def get_workspace(self, name: str) -> Workspace:
        with read(self.database) as connection:
            return _find_workspace(connection, name)

    def update_workspace(self, name: str, *, plan: str) -> Workspace:
        """Changes the plan, for every request from now on."""
        _check_plan(plan)
        with write(self.database) as connection:
            workspace = _find_workspace(connection, name)
            connection.execute(update(workspaces).where(workspaces.c.id == workspace.id).values(plan=plan))
            _bump(connection)
            return _find_workspace(connection, name)

    def delete_workspace(self, name: str) -> None:
        """Revokes its keys and frees its name; its usage rows stay."""
        with write(self.database) as connection:
            workspace = _find_workspace(connection, name)
            now = now_ms()
            mine = (keys.c.workspace_id == workspace.id) & keys.c.revoked_at.is_(None)
            connection.execute(update(keys).where(mine).values(revoked_at=now))
            connection.execute(update(workspaces).where(workspaces.c.id == workspace.id).values(deleted_at=now))
            _bump(connection)

    # ------------------------------------------------------------------------------------------ keys

    def create_key(
        self,
        workspace: str,
        *,
        scopes: Iterable[str] | None = None,
        expires_in: timedelta | None = None,
        test: bool = False,
    ) -> CreatedKey:
        """A new key. `scopes` None: the ones that a new key has."""
        chosen = _scopes(scopes)
        with write(self.database) as connection:
            workspace_id = _find_workspace(connection, workspace).id
            expires_at = None if expires_in is None else now_ms() + _milliseconds(expires_in)
            key_id, key = _insert_key(connection, workspace_id, chosen, test=test, expires_at=expires_at)
            _bump(connection)
        return CreatedKey(key_id, key, workspace, chosen, _time_or_none(expires_at))

    def list_keys(self, workspace: str) -> list[Key]:
        """Oldest first, revoked and expired ones too."""
        with read(self.database) as connection:
            workspace_id = _find_workspace(connection, workspace).id
            query = select(keys).where(keys.c.workspace_id == workspace_id).order_by(keys.c.created_at, keys.c.id)
            return [
                Key(
                    key_id=row["id"],
                    workspace=workspace,
                    scopes=tuple(row["scopes"].split()),
                    test=row["test"],
                    created_at=_time(row["created_at"]),
                    expires_at=_time_or_none(row["expires_at"]),
                    revoked_at=_time_or_none(row["revoked_at"]),
                )
                for row in connection.execute(query).mappings()
            ]

    def rotate_key(self, key_id: str, grace: timedelta) -> RotatedKey:
        """A new key like the old one; the old one lives on for `grace`, or until it would have ended if that is sooner.

        A key that had a lifetime gives its successor the same, from now.
        """
        with write(self.database) as connection:
            old = _find_key(connection, key_id)
            now = now_ms()
            ended = old["revoked_at"] is not None or (old["expires_at"] is not None and old["expires_at"] <= now)
            if ended:
                raise InvalidValue(f"The key {key_id} has ended already; make a new one instead.")
            lifetime = None if old["expires_at"] is None else old["expires_at"] - old["created_at"]
            new_id_, key = _insert_key(
                connection,
                old["workspace_id"],
                tuple(old["scopes"].split()),
                test=old["test"],
                expires_at=None if lifetime is None else now + lifetime,
            )
            old_expires_at = now + _milliseconds(grace)
            if old["expires_at"] is not None:
                old_expires_at = min(old_expires_at, old["expires_at"])
            connection.execute(update(keys).where(keys.c.id == key_id).values(expires_at=old_expires_at))
            _bump(connection)
        return RotatedKey(new_id_, key, key_id, _time(old_expires_at))

    def revoke_key(self, key_id: str) -> None:
        """Ends a key at once. One that is revoked already stays as it is."""
        with write(self.database) as connection:
            old = _find_key(connection, key_id)
            if old["revoked_at"] is None:
                connection.execute(update(keys).where(keys.c.id == key_id).values(revoked_at=now_ms()))
                _bump(connection)

    # ------------------------------------------------------------------------------------------ what a request asks

    def find_principal(self, key_hash: bytes) -> Principal | None:
        """Who the key with this hash stands for; None where it is unknown or revoked. The caller checks expiry."""
        query = (
            select(
                keys,
                workspaces.c.name,
                workspaces.c.plan,
                workspaces.c.cache_salt,
                workspaces.c.requests_per_minute,
                workspaces.c.tokens_per_day,
            )
            .join(workspaces, keys.c.workspace_id == workspaces.c.id)
            .where(keys.c.hash == key_hash, keys.c.revoked_at.is_(None), workspaces.c.deleted_at.is_(None))
        )
        with read(self.database) as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None:
            return None
        return Principal(
            key_id=row["id"],
            key_hash=row["hash"],
            workspace_id=row["workspace_id"],
            workspace=row["name"],
            plan=row["plan"],
            cache_salt=row["cache_salt"],
            scopes=frozenset(row["scopes"].split()),
            expires_at=_time_or_none(row["expires_at"]),
            requests_per_minute=row["requests_per_minute"],
            tokens_per_day=row["tokens_per_day"],
        )

    def generation(self) -> int:
        """A number that every change to workspaces and keys raises."""
        with read(self.database) as connection:
            return int(connection.execute(select(generation.c.value)).scalar_one())


def _bump(connection: Connection) -> None:
    connection.execute(update(generation).values(value=generation.c.value + 1))


def _find_workspace(connection: Connection, name: str) -> Workspace:
    query = select(workspaces).where(workspaces.c.name == name, workspaces.c.deleted_at.is_(None))
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise Missing(f"There is no workspace named {name}; see: aiexport-edge workspaces list")
    return _workspace(row)


def _find_key(connection: Connection, key_id: str) -> Any:
    row = connection.execute(select(keys).where(keys.c.id == key_id)).mappings().one_or_none()
    if row is None:
        raise Missing(f"There is no key {key_id}; see: aiexport-edge keys list --workspace NAME")
    return row


def _insert_key(
    connection: Connection, workspace_id: str, scopes: tuple[str, ...], *, test: bool, expires_at: int | None
) -> tuple[str, str]:
    key_id, key = new_id("key_"), new_key(test=test)
    connection.execute(
        insert(keys).values(
            id=key_id,
            workspace_id=workspace_id,
            hash=hash_key(key),
            scopes=" ".join(scopes),
            test=test,
            created_at=now_ms(),
            expires_at=expires_at,
        )
    )
    return key_id, key


def _check_plan(plan: str) -> None:
    if plan not in PLANS:
        raise InvalidValue(f"{plan!r} is no plan; choose free, pro or enterprise.")


def _scopes(scopes: Iterable[str] | None) -> tuple[str, ...]:
    chosen = DEFAULT_SCOPES if scopes is None else tuple(dict.fromkeys(scopes))
    for scope in chosen:
        if scope not in SCOPES:
            raise InvalidValue(f"{scope!r} is no scope; choose from {', '.join(SCOPES)}.")
    if not chosen:
        raise InvalidValue(f"A key without a scope can do nothing; choose from {', '.join(SCOPES)}.")
    return chosen


def _workspace(row: Any) -> Workspace:
    return Workspace(id=row["id"], name=row["name"], plan=row["plan"], created_at=_time(row["created_at"]))


def _milliseconds(value: timedelta) -> int:
    return value // timedelta(milliseconds=1)


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _time_or_none(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else _time(milliseconds)
