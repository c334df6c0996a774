"""OAuth clients, signing keys, the operator's login."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("keys", sa.Column("lifetime", sa.BigInteger))
    op.execute("UPDATE keys SET lifetime = expires_at - created_at")
    op.create_table(
        "oauth_clients",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("workspace_id", sa.String(40), sa.ForeignKey("workspaces.id"), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(32), nullable=False),
        sa.Column("old_secret_hash", sa.LargeBinary(32)),
        sa.Column("old_secret_expires_at", sa.BigInteger),
        sa.Column("scopes", sa.String(200), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("revoked_at", sa.BigInteger),
    )
    op.create_index("ix_oauth_clients_workspace_id", "oauth_clients", ["workspace_id"])
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("public_key", sa.LargeBinary(32), nullable=False),
        sa.Column("sealed_private_key", sa.LargeBinary(200), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("retired_at", sa.BigInteger),
    )
    op.create_table(
        "operator_login",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("password_hash", sa.String(300), nullable=False),
        sa.Column("changed_at", sa.BigInteger, nullable=False),
    )
