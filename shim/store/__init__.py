"""The durable store: workspaces, keys, usage."""

from aiexport_edge.shim.store.errors import (
    InvalidValue,
    Missing,
    NameTaken,
    NotAllowed,
    StoreError,
    TooMany,
    WrongSchema,
)
from aiexport_edge.shim.store.store import Store, open_store
from aiexport_edge.shim.store.values import (
    CreatedKey,
    CreatedOAuthClient,
    Key,
    OAuthClient,
    Principal,
    RotatedKey,
    RotatedSecret,
    UsageRow,
    Workspace,
)

__all__ = [
    "CreatedKey",
    "CreatedOAuthClient",
    "InvalidValue",
    "Key",
    "Missing",
    "NameTaken",
    "NotAllowed",
    "OAuthClient",
    "Principal",
    "RotatedKey",
    "RotatedSecret",
    "Store",
    "StoreError",
    "TooMany",
    "UsageRow",
    "Workspace",
    "WrongSchema",
    "open_store",
]
