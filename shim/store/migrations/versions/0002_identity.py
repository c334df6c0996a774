"""OAuth clients, signing keys, the operator's login."""

from __future__ import annotations

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    pass
