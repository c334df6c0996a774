"""Replies kept for idempotency keys, and the history that /status shows."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "idempotency",
        sa.Column("workspace_id", sa.String(40), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("claim_id", sa.String(40), nullable=False),
        sa.Column("origin_id", sa.String(40), nullable=False),
        sa.Column("process_id", sa.String(40), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(32), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("status", sa.Integer),
        sa.Column("headers", sa.String(2000)),
        sa.Column("body", sa.LargeBinary),
    )
    op.create_index("idempotency_expires", "idempotency", ["expires_at"])
    running = sa.text("state = 'running'")
    op.create_index(
        "idempotency_running", "idempotency", ["process_id"], sqlite_where=running, postgresql_where=running
    )
    op.create_table(
        "uptime",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger, nullable=False),
    )
    op.create_index("uptime_ended", "uptime", ["ended_at"])
