"""The tables, as SQLAlchemy Core. Owns names and types; migrations in `migrations/versions` bring a database to them.

Times are whole milliseconds since 1970 in UTC, so that they compare alike in every database.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    text,
)

REVISION = "0005"  # the newest migration; known here so that a start on a current database need not import Alembic

metadata = MetaData()

workspaces = Table(
    "workspaces",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("name", String(63), nullable=False),
    Column("plan", String(16), nullable=False),
    Column("cache_salt", LargeBinary(16), nullable=False),  # prefixes are cached under it: private to the workspace
    Column("created_at", BigInteger, nullable=False),
    Column("deleted_at", BigInteger),
    # A deleted workspace keeps its row for its usage and frees its name.
    Index(
        "workspaces_name",
        "name",
        unique=True,
        sqlite_where=text("deleted_at IS NULL"),
        postgresql_where=text("deleted_at IS NULL"),
    ),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), nullable=False, index=True),
    Column("hash", LargeBinary(32), nullable=False, unique=True),  # SHA-256 of the key, which is kept nowhere
    Column("scopes", String(200), nullable=False),  # separated by spaces
    Column("test", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
)

# Programs that exchange their id and secret for short tokens (OAuth 2.0 client credentials).
oauth_clients = Table(
    "oauth_clients",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), nullable=False, index=True),
    Column("secret_hash", LargeBinary(32), nullable=False),  # SHA-256
    Column("old_secret_hash", LargeBinary(32)),  # after a rotation, until the time beside it
    Column("old_secret_expires_at", BigInteger),
    Column("scopes", String(200), nullable=False),  # separated by spaces
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

# What signs the tokens. The newest signs; a retired one verifies until the last token that it signed has expired.
signing_keys = Table(
    "signing_keys",
    metadata,
    Column("id", String(40), primary_key=True),  # the tokens' `kid`
    Column("public_key", LargeBinary(32), nullable=False),  # Ed25519, raw
    Column("sealed_private_key", LargeBinary(200), nullable=False),  # raw, sealed by `shim/secrets`
    Column("created_at", BigInteger, nullable=False),
    Column("retired_at", BigInteger),
)

# One row at most: the login of the admin listener.
operator_login = Table(
    "operator_login",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("password_hash", String(300), nullable=False),  # scrypt, with its parameters and salt
    Column("changed_at", BigInteger, nullable=False),
)

# One row. Bumped by every change to workspaces and keys; processes poll it to drop what they have cached.
generation = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("value", BigInteger, nullable=False),
)

# The shim processes that are alive; one whose heartbeat has stopped is dead, and another settles its usage rows.
processes = Table(
    "processes",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("started_at", BigInteger, nullable=False),
    Column("heartbeat_at", BigInteger, nullable=False),
)

usage = Table(
    "usage",
    metadata,
    Column("request_id", String(40), primary_key=True),
    Column("message_id", String(40), nullable=False),
    Column("process_id", String(40), nullable=False),
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), nullable=False),
    Column("key_id", String(40), nullable=False),
    Column("model", String(128), nullable=False),
    Column("status", String(16), nullable=False),  # running, completed, aborted, failed
    Column("input_tokens", BigInteger, nullable=False),  # less the cached ones
    Column("cache_read_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("first_token_at", BigInteger),
    Column("ended_at", BigInteger),
    Index("usage_workspace_time", "workspace_id", "created_at"),
    Index("usage_created", "created_at"),  # the newest first tokens, for /status
    Index(
        "usage_running",
        "process_id",
        sqlite_where=text("status = 'running'"),
        postgresql_where=text("status = 'running'"),
    ),
)

# Requests with an Idempotency-Key. A key belongs to one attempt at a time (`claim_id`); its reply is kept once it is final.
idempotency = Table(
    "idempotency",
    metadata,
    Column("workspace_id", String(40), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("claim_id", String(40), nullable=False),
    Column("process_id", String(40), nullable=False),
    Column("fingerprint", LargeBinary(32), nullable=False),  # SHA-256 of path and body; the body itself is not kept
    Column("state", String(16), nullable=False),  # running, kept, too_large
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("status", Integer),
    Column("headers", String(2000)),  # JSON
    Column("body", LargeBinary),  # raw deflate
    Index("idempotency_expires", "expires_at"),
)

# Stretches of time in which a shim process could serve at least one model. What no stretch covers was downtime.
uptime = Table(
    "uptime",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("started_at", BigInteger, nullable=False),
    Column("ended_at", BigInteger, nullable=False),
    Index("uptime_ended", "ended_at"),
)
