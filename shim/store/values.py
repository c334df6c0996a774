"""What the store hands out and takes in: frozen values, no table in sight. Times are in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Workspace:
    """One customer of the installation: keys, usage and cached prefixes belong to it."""

    id: str
    name: str
    plan: str
    created_at: datetime
    requests_per_minute: int | None = None  # of its own: None is the plan's, 0 no limit
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A fine-tuned model of a workspace: `full_id` is what its requests name, `adapter_id` what the engines know."""

    full_id: str
    workspace: str
    base: str
    path: str
    created_at: datetime
    adapter_id: str


@dataclass(frozen=True, slots=True)
class Key:
    """A key as it can be listed: everything but itself."""

    key_id: str
    workspace: str
    scopes: tuple[str, ...]
    test: bool
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """`key` is shown this once and stored nowhere."""

    key_id: str
    key: str
    workspace: str
    scopes: tuple[str, ...]
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class RotatedKey:
    """A new key, and until when the old one goes on."""

    key_id: str
    key: str
    old_key_id: str
    old_expires_at: datetime


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a credential stands for, as much as a request needs to know."""

    kind: str  # "key", or "token" for an OAuth client's
    key_id: str  # of the key, or of the OAuth client: what usage counts under
    digest: bytes  # SHA-256 of the credential
    workspace_id: str
    workspace: str
    plan: str
    cache_salt: bytes
    scopes: frozenset[str]
    expires_at: datetime | None
    test: bool  # a test key; what it makes is too
    requests_per_minute: int | None  # the workspace's own: None is the plan's, 0 no limit
    tokens_per_day: int | None


@dataclass(frozen=True, slots=True)
class OAuthClient:
    """A program that exchanges its id and secret for tokens; everything but the secret."""

    client_id: str
    workspace: str
    scopes: tuple[str, ...]
    created_at: datetime
    old_secret_expires_at: datetime | None
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class CreatedOAuthClient:
    """`client_secret` is shown this once and stored nowhere."""

    client_id: str
    client_secret: str
    workspace: str
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RotatedSecret:
    """A client's new secret, and until when the old one goes on."""

    client_id: str
    client_secret: str
    old_secret_expires_at: datetime


@dataclass(frozen=True, slots=True)
class UsageRow:
    """What one request has used so far. `status` is running, completed, aborted or failed."""

    request_id: str
    message_id: str
    workspace_id: str
    key_id: str
    model: str
    status: str
    input_tokens: int  # less the cached ones
    cache_read_input_tokens: int
    output_tokens: int
    created_at: datetime
    first_token_at: datetime | None = None
    ended_at: datetime | None = None
    batch: bool = False
    cost: int = 0  # 1e-12 US dollars

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.cache_read_input_tokens + self.output_tokens
