"""OAuth clients in the database. Synchronous.

A secret is kept as its hash alone. After a rotation the old secret goes on for a while beside the new one.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine, insert, select, update

from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.errors import InvalidValue, Missing
from aiexport_edge.shim.store.key_rows import checked_scopes
from aiexport_edge.shim.store.keys import hash_key, new_id
from aiexport_edge.shim.store.rows import bump, milliseconds, now_ms, time_of, time_or_none
from aiexport_edge.shim.store.schema import oauth_clients, workspaces
from aiexport_edge.shim.store.values import CreatedOAuthClient, OAuthClient, RotatedSecret

SECRET_PREFIX = "axp_secret_"


@dataclass(frozen=True, slots=True)
class Grantee:
    """A client that has shown its secret: what a token for it may say."""

    client_id: str
    workspace_id: str
    workspace: str
    plan: str
    scopes: tuple[str, ...]


class OAuthClients:
    """Every method is one transaction, and raises `StoreError` with a sentence."""

    def __init__(self, database: Engine) -> None:
        self._database = database

    def create(self, workspace: str, *, scopes: Iterable[str] | None = None) -> CreatedOAuthClient:
        """A new client. `scopes` None: the ones that a new key has."""
        chosen = checked_scopes(scopes)
        client_id, secret = new_id("client_"), _new_secret()
        with write(self._database) as connection:
            query = select(workspaces.c.id).where(workspaces.c.name == workspace, workspaces.c.deleted_at.is_(None))
            workspace_id = connection.execute(query).scalar_one_or_none()
            if workspace_id is None:
                raise Missing(f"There is no workspace named {workspace}; see: aiexport-edge workspaces list")
            connection.execute(
                insert(oauth_clients).values(
                    id=client_id,
                    workspace_id=workspace_id,
                    secret_hash=hash_key(secret),
                    scopes=" ".join(chosen),
                    created_at=now_ms(),
                )
            )
            bump(connection)
        return CreatedOAuthClient(client_id, secret, workspace, chosen)

    def list(self, workspace: str | None = None) -> list[OAuthClient]:
        """Of one workspace or all that are not deleted: by workspace, oldest first, revoked ones too."""
        query = (
            select(oauth_clients, workspaces.c.name)
            .join(workspaces, oauth_clients.c.workspace_id == workspaces.c.id)
            .where(workspaces.c.deleted_at.is_(None))
            .order_by(workspaces.c.name, oauth_clients.c.created_at, oauth_clients.c.id)
        )
        if workspace is not None:
            query = query.where(workspaces.c.name == workspace)
        now = now_ms()
        with read(self._database) as connection:
            return [_client(row, now) for row in connection.execute(query).mappings()]

    def rotate_secret(self, client_id: str, grace: timedelta) -> RotatedSecret:
        """A new secret; the old one goes on for `grace`, one that was replaced earlier ends now."""
        secret = _new_secret()
        old_expires_at = now_ms() + milliseconds(grace)
        with write(self._database) as connection:
            query = select(oauth_clients).where(oauth_clients.c.id == client_id)
            row = connection.execute(query).mappings().one_or_none()
            if row is None:
                raise _no_client(client_id)
            if row["revoked_at"] is not None:
                raise InvalidValue(f"The client {client_id} is revoked; make a new one instead.")
            connection.execute(
                update(oauth_clients)
                .where(oauth_clients.c.id == client_id)
                .values(
                    secret_hash=hash_key(secret),
                    old_secret_hash=row["secret_hash"],
                    old_secret_expires_at=old_expires_at,
                )
            )
            bump(connection)
        return RotatedSecret(client_id, secret, time_of(old_expires_at))

    def revoke(self, client_id: str) -> None:
        """Ends a client and its tokens at once. One that is revoked already stays as it is."""
        with write(self._database) as connection:
            query = select(oauth_clients.c.revoked_at).where(oauth_clients.c.id == client_id)
            row = connection.execute(query).one_or_none()
            if row is None:
                raise _no_client(client_id)
            if row.revoked_at is None:
                ended = update(oauth_clients).where(oauth_clients.c.id == client_id).values(revoked_at=now_ms())
                connection.execute(ended)
                bump(connection)

    def prove(self, client_id: str, secret: str) -> Grantee | None:
        """The client, if `secret` is one of its own; None otherwise, and for a revoked one or a deleted workspace."""
        query = (
            select(oauth_clients, workspaces.c.name, workspaces.c.plan)
            .join(workspaces, oauth_clients.c.workspace_id == workspaces.c.id)
            .where(
                oauth_clients.c.id == client_id,
                oauth_clients.c.revoked_at.is_(None),
                workspaces.c.deleted_at.is_(None),
            )
        )
        with read(self._database) as connection:
            row = connection.execute(query).mappings().one_or_none()
        if row is None or not secret.isascii():
            return None
        digest = hash_key(secret)
        is_new = hmac.compare_digest(row["secret_hash"], digest)
        is_old = hmac.compare_digest(row["old_secret_hash"] or b"", digest)
        if not is_new and not (is_old and row["old_secret_expires_at"] > now_ms()):
            return None
        return Grantee(
            client_id=row["id"],
            workspace_id=row["workspace_id"],
            workspace=row["name"],
            plan=row["plan"],
            scopes=tuple(row["scopes"].split()),
        )


def _new_secret() -> str:
    """32 random bytes, in URL-safe base64 behind a prefix that scanners for leaked secrets can know."""
    return SECRET_PREFIX + secrets.token_urlsafe(32)


def _no_client(client_id: str) -> Missing:
    return Missing(f"There is no OAuth client {client_id}; see: aiexport-edge oauth-clients list")


def _client(row: Any, now: int) -> OAuthClient:
    old = row["old_secret_expires_at"]
    return OAuthClient(
        client_id=row["id"],
        workspace=row["name"],
        scopes=tuple(row["scopes"].split()),
        created_at=time_of(row["created_at"]),
        old_secret_expires_at=time_or_none(old if old is not None and old > now else None),
        revoked_at=time_or_none(row["revoked_at"]),
    )
