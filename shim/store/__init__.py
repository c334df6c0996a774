"""The durable store: workspaces, keys, usage."""

from aiexport_edge.shim.store.errors import InvalidValue, Missing, NameTaken, StoreError, WrongSchema
from aiexport_edge.shim.store.store import Store, open_store
from aiexport_edge.shim.store.values import CreatedKey, Key, Principal, RotatedKey, UsageRow, Workspace

__all__ = [
    "CreatedKey",
    "InvalidValue",
    "Key",
    "Missing",
    "NameTaken",
    "Principal",
    "RotatedKey",
    "Store",
    "StoreError",
    "UsageRow",
    "Workspace",
    "WrongSchema",
    "open_store",
]
