"""Alembic's entry: runs the migrations on the engine that `database.py` hands over."""

from __future__ import annotations

from alembic import context

from aiexport_edge.shim.store.database import lock_migrations, write
from aiexport_edge.shim.store.schema import metadata

with write(context.config.attributes["engine"]) as connection:
    lock_migrations(connection)
    context.configure(connection=connection, target_metadata=metadata, transaction_per_migration=False)
    with context.begin_transaction():
        context.run_migrations()
