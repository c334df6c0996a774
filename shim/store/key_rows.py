"""API keys in the database: made, rotated and ended, by the command line or by a workspace's own program.

The functions work inside a transaction of their caller. `KeyRows` is what a program of the workspace may do: it sees
nothing of any other. Synchronous.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Engine, and_, func, insert, or_, select, tuple_, update

from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.errors import InvalidValue, Missing, NotAllowed, TooMany
from aiexport_edge.shim.store.keys import DEFAULT_SCOPES, SCOPES, hash_key, new_id, new_key
from aiexport_edge.shim.store.rows import bump, milliseconds, now_ms, time_of, time_or_none
from aiexport_edge.shim.store.schema import keys, workspaces
from aiexport_edge.shim.store.values import CreatedKey, Key, RotatedKey

MAX_LIVE_KEYS = 1000  # that a workspace's own programs can reach


def checked_scopes(scopes: Iterable[str] | None) -> tuple[str, ...]:
    """`scopes` without repetition, None as those that a new key has. Raises `InvalidValue`."""
    chosen = DEFAULT_SCOPES if scopes is None else tuple(dict.fromkeys(scopes))
    for scope in chosen:
        if scope not in SCOPES:
            raise InvalidValue(f"{scope!r} is no scope; choose from {', '.join(SCOPES)}.")
    if not chosen:
        raise InvalidValue(f"Without a scope nothing can be done; choose from {', '.join(SCOPES)}.")
    return chosen


def create(
    connection: Connection,
    workspace_id: str,
    workspace: str,
    scopes: tuple[str, ...],
    *,
    lifetime_ms: int | None,
    test: bool,
) -> CreatedKey:
    """A new key, which is in the result and nowhere else."""
    key_id, key, now = new_id("key_"), new_key(test=test), now_ms()
    expires_at = None if lifetime_ms is None else now + lifetime_ms
    connection.execute(
        insert(keys).values(
            id=key_id,
            workspace_id=workspace_id,
            hash=hash_key(key),
            scopes=" ".join(scopes),
            test=test,
            created_at=now,
            lifetime=lifetime_ms,
            expires_at=expires_at,
        )
    )
    bump(connection)
    return CreatedKey(key_id, key, workspace, scopes, time_or_none(expires_at))


def rotate(connection: Connection, old: Any, workspace: str, grace: timedelta) -> tuple[CreatedKey, RotatedKey]:
    """A new key like the row `old`, which lives on for `grace`, or until it would have ended if that is sooner.

    A key that was made to live for some time gives its successor the same, from now. Raises `InvalidValue` for one that
    has ended.
    """
    now = now_ms()
    if old["revoked_at"] is not None or (old["expires_at"] is not None and old["expires_at"] <= now):
        raise InvalidValue(f"The key {old['id']} has ended already; make a new one instead.")
    scopes = tuple(old["scopes"].split())
    created = create(connection, old["workspace_id"], workspace, scopes, lifetime_ms=old["lifetime"], test=old["test"])
    old_expires_at = now + milliseconds(grace)
    if old["expires_at"] is not None:
        old_expires_at = min(old_expires_at, old["expires_at"])
    connection.execute(update(keys).where(keys.c.id == old["id"]).values(expires_at=old_expires_at))
    return created, RotatedKey(created.key_id, created.key, old["id"], time_of(old_expires_at))


def revoke(connection: Connection, key_id: str) -> None:
    """Ends a key at once. One that is revoked already stays as it is."""
    alive = (keys.c.id == key_id) & keys.c.revoked_at.is_(None)
    if connection.execute(update(keys).where(alive).values(revoked_at=now_ms())).rowcount:
        bump(connection)


def key_of(row: Any, workspace: str) -> Key:
    """A row as it can be listed."""
    return Key(
        key_id=row["id"],
        workspace=workspace,
        scopes=tuple(row["scopes"].split()),
        test=row["test"],
        created_at=time_of(row["created_at"]),
        expires_at=time_or_none(row["expires_at"]),
        revoked_at=time_or_none(row["revoked_at"]),
    )


class KeyRows:
    """What a program may do with the keys of its own workspace, a transaction each. A revoked key is not there."""

    def __init__(self, database: Engine) -> None:
        self._database = database

    def page(self, workspace_id: str, limit: int, after_id: str | None) -> tuple[list[Key], bool]:
        """At most `limit` keys after `after_id`, newest first, expired ones too; and whether there are more.

        Raises `Missing` where there is no key `after_id`.
        """
        place = tuple_(keys.c.created_at, keys.c.id)
        with read(self._database) as connection:
            name = _workspace_name(connection, workspace_id)
            query = select(keys).where(_there(workspace_id)).order_by(keys.c.created_at.desc(), keys.c.id.desc())
            if after_id is not None:
                cursor = self._find(connection, workspace_id, after_id)
                query = query.where(place < tuple_(cursor["created_at"], cursor["id"]))
            rows = connection.execute(query.limit(limit + 1)).mappings().all()
        return [key_of(row, name) for row in rows[:limit]], len(rows) > limit

    def create(
        self, workspace_id: str, scopes: tuple[str, ...], *, expires_in: timedelta | None, test: bool
    ) -> tuple[CreatedKey, Key]:
        """Raises `TooMany`, `Missing` (the workspace has just been deleted)."""
        lifetime = None if expires_in is None else milliseconds(expires_in)
        with write(self._database) as connection:
            name = _workspace_name(connection, workspace_id)
            created = create(connection, workspace_id, name, scopes, lifetime_ms=lifetime, test=test)
            _check_count(connection, workspace_id)
            return created, key_of(self._find(connection, workspace_id, created.key_id), name)

    def rotate(
        self, workspace_id: str, key_id: str, grace: timedelta, *, within: frozenset[str]
    ) -> tuple[CreatedKey, RotatedKey, Key]:
        """Raises `Missing`, `InvalidValue` for a key that has ended, `NotAllowed` for scopes outside `within`."""
        with write(self._database) as connection:
            name = _workspace_name(connection, workspace_id)
            old = self._find(connection, workspace_id, key_id)
            if beyond := [scope for scope in old["scopes"].split() if scope not in within]:
                raise NotAllowed(f"That key has the scope {beyond[0]}, which the caller's does not have.")
            created, rotated = rotate(connection, old, name, grace)
            _check_count(connection, workspace_id)
            return created, rotated, key_of(self._find(connection, workspace_id, created.key_id), name)

    def revoke(self, workspace_id: str, key_id: str) -> None:
        """Raises `Missing`."""
        with write(self._database) as connection:
            self._find(connection, workspace_id, key_id)
            revoke(connection, key_id)

    def _find(self, connection: Connection, workspace_id: str, key_id: str) -> Any:
        query = select(keys).where(_there(workspace_id), keys.c.id == key_id)
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise Missing("There is no such key.")
        return row


def _there(workspace_id: str) -> Any:
    return and_(keys.c.workspace_id == workspace_id, keys.c.revoked_at.is_(None))


def _workspace_name(connection: Connection, workspace_id: str) -> str:
    query = select(workspaces.c.name).where(workspaces.c.id == workspace_id, workspaces.c.deleted_at.is_(None))
    name: str | None = connection.execute(query).scalar_one_or_none()
    if name is None:
        raise Missing("There is no such workspace.")
    return name


def _check_count(connection: Connection, workspace_id: str) -> None:
    alive = or_(keys.c.expires_at.is_(None), keys.c.expires_at > now_ms())
    count = connection.execute(select(func.count()).where(_there(workspace_id), alive)).scalar_one()
    if count > MAX_LIVE_KEYS:
        raise TooMany(f"This workspace has {MAX_LIVE_KEYS:,} keys that have not ended; delete those not in use.")
