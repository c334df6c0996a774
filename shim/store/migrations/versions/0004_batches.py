"""Batches, their requests, and webhooks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "batches",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("workspace_id", sa.String(40), sa.ForeignKey("workspaces.id"), nullable=False),
        sa.Column("key_id", sa.String(40), nullable=False),
        sa.Column("accepted", sa.Boolean, nullable=False),
        sa.Column("origin_id", sa.String(40)),
        sa.Column("webhook_url", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
        sa.Column("deleted_at", sa.BigInteger),
        sa.Column("stop", sa.String(16)),
        sa.Column("num_total", sa.Integer, nullable=False),
        *(
            sa.Column(f"num_{count}", sa.Integer, nullable=False, server_default="0")
            for count in ("processing", "succeeded", "errored", "canceled", "expired")
        ),
    )
    op.create_index("batches_workspace", "batches", ["workspace_id", "created_at"])
    op.create_index("batches_origin", "batches", ["origin_id"])
    unended = sa.text("ended_at IS NULL")
    op.create_index("batches_open", "batches", ["created_at"], sqlite_where=unended, postgresql_where=unended)
    op.create_table(
        "batch_items",
        sa.Column("batch_id", sa.String(40), sa.ForeignKey("batches.id"), primary_key=True),
        sa.Column("item_index", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("custom_id", sa.String(64)),
        sa.Column("model", sa.String(160), nullable=False),
        sa.Column("body_bytes", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(40)),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("result", sa.LargeBinary),
    )
    op.create_index("batch_items_state", "batch_items", ["batch_id", "state", "item_index"])
    owned = sa.text("owner IS NOT NULL")
    op.create_index("batch_items_owner", "batch_items", ["owner"], sqlite_where=owned, postgresql_where=owned)
    op.create_table(
        "batch_bodies",
        sa.Column("batch_id", sa.String(40), sa.ForeignKey("batches.id"), primary_key=True),
        sa.Column("item_index", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "webhook_secrets",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("workspace_id", sa.String(40), sa.ForeignKey("workspaces.id"), nullable=False),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("retires_at", sa.BigInteger),
    )
    op.create_index("ix_webhook_secrets_workspace_id", "webhook_secrets", ["workspace_id"])
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("workspace_id", sa.String(40), sa.ForeignKey("workspaces.id"), nullable=False),
        sa.Column("batch_id", sa.String(40), nullable=False, unique=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("payload", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("next_at", sa.BigInteger, nullable=False),
        sa.Column("give_up_at", sa.BigInteger, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("last_status", sa.Integer),
        sa.Column("last_error", sa.String(300)),
    )
    pending = sa.text("state = 'pending'")
    op.create_index(
        "webhook_deliveries_pending",
        "webhook_deliveries",
        ["next_at"],
        sqlite_where=pending,
        postgresql_where=pending,
    )
