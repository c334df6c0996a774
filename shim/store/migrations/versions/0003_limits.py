"""Limits of workspaces and what is counted against them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("workspaces", sa.Column("requests_per_minute", sa.BigInteger))
    op.add_column("workspaces", sa.Column("tokens_per_day", sa.BigInteger))
    op.add_column("usage", sa.Column("batch", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("usage", sa.Column("cost", sa.BigInteger, nullable=False, server_default="0"))
    op.create_index("usage_created_at", "usage", ["created_at"])
    op.create_table(
        "usage_days",
        sa.Column("workspace_id", sa.String(40), sa.ForeignKey("workspaces.id"), primary_key=True),
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("model", sa.String(160), primary_key=True),
        sa.Column("key_id", sa.String(40), primary_key=True),
        sa.Column("batch", sa.Boolean, primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("input_tokens", sa.BigInteger, nullable=False),
        sa.Column("cache_read_input_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("cost", sa.BigInteger, nullable=False),
    )
    op.execute(
        "INSERT INTO usage_days SELECT workspace_id, created_at / 86400000, model, key_id, batch, count(*), "
        "sum(input_tokens), sum(cache_read_input_tokens), sum(output_tokens), 0 FROM usage "
        "WHERE status <> 'running' AND (status = 'completed' OR input_tokens + cache_read_input_tokens "
        "+ output_tokens > 0) GROUP BY 1, 2, 3, 4, 5"
    )
    op.create_table(
        "reservations",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("process_id", sa.String(40), nullable=False),
        sa.Column("workspace_id", sa.String(40), sa.ForeignKey("workspaces.id"), nullable=False),
        sa.Column("day", sa.Integer, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_reservations_process_id", "reservations", ["process_id"])
    op.create_index("reservations_workspace_day", "reservations", ["workspace_id", "day"])
    op.create_table(
        "calls",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("workspace_id", sa.String(40), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        # a minute's worth: not worth a write-ahead log, which SQLite does not leave out
        prefixes=["UNLOGGED"] if op.get_bind().dialect.name == "postgresql" else [],
    )
    op.create_index("calls_workspace_at", "calls", ["workspace_id", "at"])
