"""Who a key or an OAuth client stands for: the two questions that authentication asks the database."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, Select, select

from aiexport_edge.shim.store.database import read
from aiexport_edge.shim.store.rows import time_or_none
from aiexport_edge.shim.store.schema import keys, oauth_clients, workspaces
from aiexport_edge.shim.store.values import Principal

_WORKSPACE = (
    workspaces.c.name,
    workspaces.c.plan,
    workspaces.c.cache_salt,
    workspaces.c.requests_per_minute,
    workspaces.c.tokens_per_day,
)


def of_key(database: Engine, digest: bytes) -> Principal | None:
    """None where no key has this hash, or it is revoked. The caller checks expiry."""
    query = (
        select(keys, *_WORKSPACE)
        .join(workspaces, keys.c.workspace_id == workspaces.c.id)
        .where(keys.c.hash == digest, keys.c.revoked_at.is_(None), workspaces.c.deleted_at.is_(None))
    )
    row = _one(database, query)
    if row is None:
        return None
    return _principal(
        row, "key", digest=row["hash"], expires_at=time_or_none(row["expires_at"]), test=bool(row["test"])
    )


def of_client(database: Engine, client_id: str) -> Principal | None:
    """Whom an OAuth client's tokens stand for, with all the client's scopes; None where it is revoked or unknown.

    The caller narrows the scopes and sets digest and expiry, which are the token's.
    """
    query = (
        select(oauth_clients, *_WORKSPACE)
        .join(workspaces, oauth_clients.c.workspace_id == workspaces.c.id)
        .where(
            oauth_clients.c.id == client_id,
            oauth_clients.c.revoked_at.is_(None),
            workspaces.c.deleted_at.is_(None),
        )
    )
    row = _one(database, query)
    return None if row is None else _principal(row, "token", digest=b"", expires_at=None, test=False)


def _one(database: Engine, query: Select[Any]) -> Any:
    with read(database) as connection:
        return connection.execute(query).mappings().one_or_none()


def _principal(row: Any, kind: str, **of_credential: Any) -> Principal:
    return Principal(
        kind=kind,
        key_id=row["id"],
        workspace_id=row["workspace_id"],
        workspace=row["name"],
        plan=row["plan"],
        cache_salt=row["cache_salt"],
        scopes=frozenset(row["scopes"].split()),
        requests_per_minute=row["requests_per_minute"],
        tokens_per_day=row["tokens_per_day"],
        **of_credential,
    )
