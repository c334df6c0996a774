"""Adapters in the database: the workspaces' fine-tuned models. Synchronous.

Owns the form of their ids, `ft-WORKSPACE-NAME`: neither part has a hyphen, so that no two can be taken for one another.
"""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, Engine, Select, insert, select, update
from sqlalchemy.exc import IntegrityError

from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.errors import InvalidValue, Missing, NameTaken
from aiexport_edge.shim.store.keys import new_id
from aiexport_edge.shim.store.rows import bump, now_ms, time_of
from aiexport_edge.shim.store.schema import adapters, workspaces
from aiexport_edge.shim.store.values import Adapter

PREFIX = "ft-"
_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,62}", re.ASCII)


def full_id(workspace: str, name: str) -> str:
    """The id that requests name."""
    return f"{PREFIX}{workspace}-{name}"


class AdapterRows:
    """Every method is one transaction, and raises `StoreError` with a sentence."""

    def __init__(self, database: Engine) -> None:
        self._database = database

    def add(self, workspace: str, name: str, *, base: str, path: str) -> Adapter:
        """A new one, for the model `base`."""
        _check_name(name)
        row = {"id": new_id("adp_"), "name": name, "base": base, "path": path, "created_at": now_ms()}
        try:
            with write(self._database) as connection:
                workspace_id = _workspace_id(connection, workspace)
                connection.execute(insert(adapters).values(**row, workspace_id=workspace_id))
                bump(connection)
        except IntegrityError:
            raise _taken(workspace, name) from None
        return _adapter({**row, "workspace": workspace})

    def check_free(self, workspace: str, name: str) -> None:
        """Raises what `add` would just now, for what takes long before it."""
        _check_name(name)
        if any(adapter.full_id == full_id(workspace, name) for adapter in self.list(workspace)):
            raise _taken(workspace, name)

    def list(self, workspace: str | None = None) -> list[Adapter]:
        """Those of living workspaces, or of one, oldest first."""
        query = _living().order_by(adapters.c.created_at, adapters.c.id)
        with read(self._database) as connection:
            if workspace is not None:
                query = query.where(adapters.c.workspace_id == _workspace_id(connection, workspace))
            return [_adapter(row) for row in connection.execute(query).mappings()]

    def remove(self, model_id: str) -> Adapter:
        """New requests find it no more."""
        with write(self._database) as connection:
            rows = connection.execute(_living()).mappings()
            found = next((adapter for adapter in map(_adapter, rows) if adapter.full_id == model_id), None)
            if found is None:
                raise Missing(f"There is no model {model_id}; see: aiexport-edge adapters list")
            this = adapters.c.id == found.adapter_id
            connection.execute(update(adapters).where(this).values(deleted_at=now_ms()))
            bump(connection)
        return found


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidValue(
            f"{name!r} can't be the id of a fine-tuned model; use lower-case letters, digits and _, at most 63, not _ "
            "first."
        )


def _taken(workspace: str, name: str) -> NameTaken:
    return NameTaken(
        f"There is a model {full_id(workspace, name)} already; remove it first: "
        f"aiexport-edge adapters remove {full_id(workspace, name)}"
    )


def _living() -> Select[Any]:
    return (
        select(adapters, workspaces.c.name.label("workspace"))
        .join(workspaces, adapters.c.workspace_id == workspaces.c.id)
        .where(adapters.c.deleted_at.is_(None), workspaces.c.deleted_at.is_(None))
    )


def _workspace_id(connection: Connection, name: str) -> str:
    query = select(workspaces.c.id).where(workspaces.c.name == name, workspaces.c.deleted_at.is_(None))
    found = connection.execute(query).scalar_one_or_none()
    if found is None:
        raise Missing(f"There is no workspace named {name}; see: aiexport-edge workspaces list")
    return str(found)


def _adapter(row: Any) -> Adapter:
    return Adapter(
        full_id=full_id(row["workspace"], row["name"]),
        workspace=row["workspace"],
        base=row["base"],
        path=row["path"],
        created_at=time_of(row["created_at"]),
        adapter_id=row["id"],
    )
