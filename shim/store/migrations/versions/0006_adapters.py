"""Adapters: the workspaces' fine-tuned models."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "adapters",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("workspace_id", sa.String(40), sa.ForeignKey("workspaces.id"), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("base", sa.String(128), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("deleted_at", sa.BigInteger),
    )
    op.create_index("ix_adapters_workspace_id", "adapters", ["workspace_id"])
    there = sa.text("deleted_at IS NULL")
    op.create_index(
        "adapters_name", "adapters", ["workspace_id", "name"], unique=True, sqlite_where=there, postgresql_where=there
    )
