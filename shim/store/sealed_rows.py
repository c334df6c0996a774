"""Which columns hold secrets sealed under a master key: are there any, under which keys, and sealing them anew.

A feature that stores such a secret adds its column to `SEALED`. Knows nothing of what a secret is for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, Engine, select, update

from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.schema import signing_keys, webhook_secrets

if TYPE_CHECKING:
    from aiexport_edge.shim.secrets import SecretBox


@dataclass(frozen=True, slots=True)
class SealedColumn:
    """A column, which may be null, and the purpose that its secrets are sealed for."""

    column: Column[Any]
    purpose: str


SEALED = (
    SealedColumn(signing_keys.c.sealed_private_key, "signing key"),
    SealedColumn(webhook_secrets.c.sealed, "webhook secret"),
)


def holds_secrets(database: Engine) -> bool:
    """Whether anything is sealed in the store."""
    with read(database) as connection:
        return any(
            connection.execute(select(each.column).where(each.column.is_not(None)).limit(1)).first() is not None
            for each in SEALED
        )


def count_by_master_key(database: Engine) -> Counter[bytes]:
    """How many secrets are sealed under each master key, by the key's id."""
    from aiexport_edge.shim.secrets.box import master_key_id

    counts: Counter[bytes] = Counter()
    with read(database) as connection:
        for each in SEALED:
            query = select(each.column).where(each.column.is_not(None))
            counts.update(master_key_id(sealed) for sealed in connection.execute(query).scalars())
    return counts


def reseal(database: Engine, box: SecretBox) -> tuple[int, int]:
    """Seals everything that is not yet under the newest master key under it.

    Returns how many secrets that were, and how many are left as they are because their master key is not here.
    """
    from aiexport_edge.shim.secrets.box import master_key_id

    newest = box.keys.newest().id
    here = {key.id for key in box.keys.all()}
    resealed = lost = 0
    with write(database) as connection:
        for each in SEALED:
            table = each.column.table
            keys = list(table.primary_key.columns)
            rows = connection.execute(select(*keys, each.column).where(each.column.is_not(None))).all()
            for *key, sealed in rows:
                sealed_under = master_key_id(sealed)
                if sealed_under == newest:
                    continue
                if sealed_under not in here:
                    lost += 1
                    continue
                again = box.seal(box.open(sealed, purpose=each.purpose), purpose=each.purpose)
                matches = [column == value for column, value in zip(keys, key, strict=True)]
                connection.execute(update(table).where(*matches).values({each.column: again}))
                resealed += 1
    return resealed, lost
