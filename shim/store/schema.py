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
    Text,
    false,
    text,
)

REVISION = "0006"  # the newest migration; known here so that a start on a current database need not import Alembic

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
    Column("requests_per_minute", BigInteger),  # here and below: null is the plan's own limit, 0 is no limit
    Column("tokens_per_day", BigInteger),
    # A deleted workspace keeps its row for its usage and frees its name.
    Index(
        "workspaces_name",
        "name",
        unique=True,
        sqlite_where=text("deleted_at IS NULL"),
        postgresql_where=text("deleted_at IS NULL"),
    ),
)

# Low-rank adapters, which are the workspaces' fine-tuned models. One that is added anew under its name is another row.
adapters = Table(
    "adapters",
    metadata,
    Column("id", String(40), primary_key=True),  # by which the engines know it
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), nullable=False, index=True),
    Column("name", String(63), nullable=False),
    Column("base", String(128), nullable=False),  # id of the model that it is for
    Column("path", Text, nullable=False),  # of its directory, on the engines' machines
    Column("created_at", BigInteger, nullable=False),
    Column("deleted_at", BigInteger),
    Index(
        "adapters_name",
        "workspace_id",
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
    Column("lifetime", BigInteger),  # milliseconds that it was made for; a rotation ends it sooner
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
    Column("model", String(160), nullable=False),
    Column("status", String(16), nullable=False),  # running, completed, aborted, failed
    Column("input_tokens", BigInteger, nullable=False),  # less the cached ones
    Column("cache_read_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("first_token_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("batch", Boolean, nullable=False, server_default=false()),
    Column("cost", BigInteger, nullable=False, server_default="0"),  # 1e-12 US dollars
    Index("usage_workspace_time", "workspace_id", "created_at"),
    Index("usage_created_at", "created_at"),
    Index(
        "usage_running",
        "process_id",
        sqlite_where=text("status = 'running'"),
        postgresql_where=text("status = 'running'"),
    ),
)

# The sums of settled usage rows, brought up to date in the transaction that settles them: what /v2/usage and the daily
# quotas read. `day` counts days since 1970-01-01 in UTC.
usage_days = Table(
    "usage_days",
    metadata,
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),
    Column("model", String(160), primary_key=True),
    Column("key_id", String(40), primary_key=True),
    Column("batch", Boolean, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("cache_read_input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost", BigInteger, nullable=False),
)

# What is in flight of workspaces whose tokens are limited, at most; gone when it is settled or its process is dead.
reservations = Table(
    "reservations",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("process_id", String(40), nullable=False, index=True),
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), nullable=False),
    Column("day", Integer, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Index("reservations_workspace_day", "workspace_id", "day"),
)

# The calls of the last minute, where PostgreSQL counts them (`limits/postgres_window.py`); times in microseconds.
calls = Table(
    "calls",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("workspace_id", String(40), nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("calls_workspace_at", "workspace_id", "at"),
    prefixes=["UNLOGGED"],
)

# Requests with an Idempotency-Key. A key belongs to one attempt at a time (`claim_id`); a final reply is kept.
idempotency = Table(
    "idempotency",
    metadata,
    Column("workspace_id", String(40), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("claim_id", String(40), nullable=False),
    Column("origin_id", String(40), nullable=False),  # the first claim, where later ones took over from dead processes
    Column("process_id", String(40), nullable=False),
    Column("fingerprint", LargeBinary(32), nullable=False),  # SHA-256 of path and body; the body itself is not kept
    Column("state", String(16), nullable=False),  # running, kept, too_large
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("status", Integer),
    Column("headers", String(2000)),  # JSON
    Column("body", LargeBinary),  # raw deflate
    Index("idempotency_expires", "expires_at"),
    Index(
        "idempotency_running",
        "process_id",
        sqlite_where=text("state = 'running'"),
        postgresql_where=text("state = 'running'"),
    ),
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

batches = Table(
    "batches",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), nullable=False),
    Column("key_id", String(40), nullable=False),
    Column("accepted", Boolean, nullable=False),  # false while its requests are being written: nobody sees it
    Column("origin_id", String(40)),  # of the Idempotency-Key that it was made with
    Column("webhook_url", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("ended_at", BigInteger),
    Column("expires_at", BigInteger, nullable=False),
    Column("deleted_at", BigInteger),  # gone for everybody; its rows follow
    Column("stop", String(16)),  # why no more of it begins: cancel, revoked, expired
    # Changed in the transaction that changes the items, so that they always add up; what is left is queued.
    Column("num_total", Integer, nullable=False),
    Column("num_processing", Integer, nullable=False, server_default="0"),
    Column("num_succeeded", Integer, nullable=False, server_default="0"),
    Column("num_errored", Integer, nullable=False, server_default="0"),
    Column("num_canceled", Integer, nullable=False, server_default="0"),
    Column("num_expired", Integer, nullable=False, server_default="0"),
    Index("batches_workspace", "workspace_id", "created_at"),
    Index("batches_origin", "origin_id"),
    Index(
        "batches_open",
        "created_at",
        sqlite_where=text("ended_at IS NULL"),
        postgresql_where=text("ended_at IS NULL"),
    ),
)

# What is asked of a batch's requests and what became of them. Small rows: the bodies are apart, so that a change of
# state does not write them again.
batch_items = Table(
    "batch_items",
    metadata,
    Column("batch_id", String(40), ForeignKey("batches.id"), primary_key=True),
    Column("item_index", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", String(64)),
    Column("model", String(160), nullable=False),
    Column("body_bytes", Integer, nullable=False),
    Column("state", String(16), nullable=False),  # queued, processing, succeeded, errored, canceled, expired
    Column("owner", String(40)),  # the process that has it, in `processes`
    Column("attempt", Integer, nullable=False),  # with the owner it fences off a result that comes too late
    Column("result", LargeBinary),  # the JSON of `result`, of one that succeeded or errored
    Index("batch_items_state", "batch_id", "state", "item_index"),
    Index(
        "batch_items_owner",
        "owner",
        sqlite_where=text("owner IS NOT NULL"),
        postgresql_where=text("owner IS NOT NULL"),
    ),
)

batch_bodies = Table(
    "batch_bodies",
    metadata,
    Column("batch_id", String(40), ForeignKey("batches.id"), primary_key=True),
    Column("item_index", Integer, primary_key=True, autoincrement=False),
    Column("body", LargeBinary, nullable=False),  # as it came: an element of `requests`
)

webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), nullable=False, index=True),
    Column("sealed", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("retires_at", BigInteger),  # null: the current one
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(40), primary_key=True),  # the header webhook-id of every try
    Column("workspace_id", String(40), ForeignKey("workspaces.id"), nullable=False),
    Column("batch_id", String(40), nullable=False, unique=True),  # a batch ends once
    Column("url", Text, nullable=False),
    Column("type", String(32), nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("state", String(16), nullable=False),  # pending, delivered, dead
    Column("created_at", BigInteger, nullable=False),
    Column("next_at", BigInteger, nullable=False),  # not tried before; in the future too while a process tries it
    Column("give_up_at", BigInteger, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("ended_at", BigInteger),
    Column("last_status", Integer),
    Column("last_error", String(300)),
    Index(
        "webhook_deliveries_pending",
        "next_at",
        sqlite_where=text("state = 'pending'"),
        postgresql_where=text("state = 'pending'"),
    ),
)
