"""Workspaces and keys in the database. Synchronous: callers on an event loop use a thread.

Every change bumps the generation, which running processes poll; so a revoked key is refused by all of them within a
second. Usage rows are `usage_rows.py`'s.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypedDict, Unpack

from sqlalchemy import Connection, Engine, insert, select, update
from sqlalchemy.exc import IntegrityError

from aiexport_edge.shim.store import key_rows, principals
from aiexport_edge.shim.store.database import open_database, read, write
from aiexport_edge.shim.store.errors import InvalidValue, Missing, NameTaken
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.rows import bump as _bump
from aiexport_edge.shim.store.rows import milliseconds, time_of
from aiexport_edge.shim.store.rows import now_ms as now_ms
from aiexport_edge.shim.store.schema import generation, keys, oauth_clients, workspaces
from aiexport_edge.shim.store.values import CreatedKey, Key, Principal, RotatedKey, Workspace

PLANS = ("free", "pro", "enterprise")
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,62}", re.ASCII)


class WorkspaceChanges(TypedDict, total=False):
    """What can be changed of a workspace; limits as `create_workspace` has them."""

    plan: str
    requests_per_minute: int | None
    tokens_per_day: int | None


def open_store(url: str) -> Store:
    """The store at an SQLAlchemy URL, migrated to this version's schema. Raises `StoreError`."""
    return Store(open_database(url))


class Store:
    """Owns the connection pool. Every method is one transaction, and raises `StoreError` with a sentence."""

    def __init__(self, database: Engine) -> None:
        self.database = database

    def close(self) -> None:
        self.database.dispose()

    # ------------------------------------------------------------------------------------------ workspaces

    def create_workspace(
        self, name: str, plan: str, *, requests_per_minute: int | None = None, tokens_per_day: int | None = None
    ) -> Workspace:
        """The limits are its own: None is the plan's, 0 none."""
        if not _NAME.fullmatch(name):
            raise InvalidValue(
                f"{name!r} can't be a workspace's name; use lower-case letters, digits and _, at most 63, not _ first."
            )
        _check_plan(plan)
        row = {
            "id": new_id("ws_"),
            "name": name,
            "plan": plan,
            "created_at": now_ms(),
            "requests_per_minute": requests_per_minute,
            "tokens_per_day": tokens_per_day,
        }
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

    def update_workspace(self, name: str, **changes: Unpack[WorkspaceChanges]) -> Workspace:
        """Changes what is named, for every request from now on."""
        if "plan" in changes:
            _check_plan(changes["plan"])
        with write(self.database) as connection:
            workspace = _find_workspace(connection, name)
            if changes:
                connection.execute(update(workspaces).where(workspaces.c.id == workspace.id).values(**changes))
                _bump(connection)
            return _find_workspace(connection, name)

    def delete_workspace(self, name: str) -> None:
        """Revokes its keys and OAuth clients, frees its name; its usage rows stay."""
        with write(self.database) as connection:
            workspace = _find_workspace(connection, name)
            now = now_ms()
            mine = (keys.c.workspace_id == workspace.id) & keys.c.revoked_at.is_(None)
            connection.execute(update(keys).where(mine).values(revoked_at=now))
            clients = (oauth_clients.c.workspace_id == workspace.id) & oauth_clients.c.revoked_at.is_(None)
            connection.execute(update(oauth_clients).where(clients).values(revoked_at=now))
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
        chosen = key_rows.checked_scopes(scopes)
        lifetime = None if expires_in is None else milliseconds(expires_in)
        with write(self.database) as connection:
            workspace_id = _find_workspace(connection, workspace).id
            return key_rows.create(connection, workspace_id, workspace, chosen, lifetime_ms=lifetime, test=test)

    def list_keys(self, workspace: str) -> list[Key]:
        """Oldest first, revoked and expired ones too."""
        with read(self.database) as connection:
            workspace_id = _find_workspace(connection, workspace).id
            query = select(keys).where(keys.c.workspace_id == workspace_id).order_by(keys.c.created_at, keys.c.id)
            return [key_rows.key_of(row, workspace) for row in connection.execute(query).mappings()]

    def rotate_key(self, key_id: str, grace: timedelta) -> RotatedKey:
        """A new key like the old one, which lives on for `grace`, or until it would have ended if that is sooner."""
        with write(self.database) as connection:
            _, rotated = key_rows.rotate(connection, _find_key(connection, key_id), "", grace)
        return rotated

    def revoke_key(self, key_id: str) -> None:
        """Ends a key at once. One that is revoked already stays as it is."""
        with write(self.database) as connection:
            _find_key(connection, key_id)
            key_rows.revoke(connection, key_id)

    # ------------------------------------------------------------------------------------------ what a request asks

    def find_principal(self, digest: bytes) -> Principal | None:
        """Who the key with this hash stands for; None where it is unknown or revoked. The caller checks expiry."""
        return principals.of_key(self.database, digest)

    def generation(self) -> int:
        """A number that every change to workspaces and keys raises."""
        with read(self.database) as connection:
            return int(connection.execute(select(generation.c.value)).scalar_one())


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


def _check_plan(plan: str) -> None:
    if plan not in PLANS:
        raise InvalidValue(f"{plan!r} is no plan; choose free, pro or enterprise.")


def _workspace(row: Any) -> Workspace:
    return Workspace(
        id=row["id"],
        name=row["name"],
        plan=row["plan"],
        created_at=time_of(row["created_at"]),
        requests_per_minute=row["requests_per_minute"],
        tokens_per_day=row["tokens_per_day"],
    )
