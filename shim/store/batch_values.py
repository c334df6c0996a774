"""What the store knows of batches, as frozen values, and the batch object of the API. Times are in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from aiexport_edge.shim.store.rows import time_of, time_or_none
from aiexport_edge.shim.store.values import Principal, UsageRow

KINDS = ("succeeded", "errored", "canceled", "expired")  # how a request of a batch ends


@dataclass(frozen=True, slots=True)
class NewItem:
    """A request that is to be stored; `body` is its element as it came."""

    index: int
    custom_id: str | None
    model: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch and how far it is. `stop` says why no more of it begins: cancel, revoked or expired."""

    id: str
    workspace_id: str
    workspace: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime
    webhook_url: str | None
    stop: str | None
    num_total: int
    num_processing: int
    num_succeeded: int
    num_errored: int
    num_canceled: int
    num_expired: int

    @property
    def num_queued(self) -> int:
        """What has neither begun nor ended."""
        ended = self.num_succeeded + self.num_errored + self.num_canceled + self.num_expired
        return self.num_total - self.num_processing - ended

    @property
    def status(self) -> str:
        if self.ended_at is not None:
            return {"cancel": "canceled", "revoked": "canceled", "expired": "expired"}.get(self.stop or "", "completed")
        if self.stop in ("cancel", "revoked"):
            return "canceling"
        return "queued" if self.started_at is None else "in_progress"

    def document(self) -> dict[str, Any]:
        """The batch object of the API."""
        return {
            "id": self.id,
            "type": "batch",
            "status": self.status,
            "request_counts": {
                "total": self.num_total,
                "queued": self.num_queued,
                "processing": self.num_processing,
                "succeeded": self.num_succeeded,
                "errored": self.num_errored,
                "canceled": self.num_canceled,
                "expired": self.num_expired,
            },
            "created_at": _rfc3339(self.created_at),
            "started_at": _rfc3339(self.started_at),
            "ended_at": _rfc3339(self.ended_at),
            "expires_at": _rfc3339(self.expires_at),
            "webhook_url": self.webhook_url,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one request; `body` is the JSON of what it succeeded with, or failed with."""

    index: int
    custom_id: str | None
    state: str
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Leased:
    """A request that this process has to answer. With the owner, `attempt` fences off a result that comes too late."""

    batch_id: str
    index: int
    attempt: int
    model: str
    body: bytes
    principal: Principal  # whose batch it is

    @property
    def request_id(self) -> str:
        """The key of its usage row: there can be one only."""
        return f"{self.batch_id}_{self.index}"


@dataclass(frozen=True, slots=True)
class Answer:
    """How a leased request ended: one of `KINDS`. `usage` where it is billed."""

    leased: Leased
    state: str
    body: bytes | None
    usage: UsageRow | None


def batch_of(row: Any) -> Batch:
    """From a row of `batches` with its workspace's name as `workspace`."""
    return Batch(
        id=row["id"],
        workspace_id=row["workspace_id"],
        workspace=row["workspace"],
        created_at=time_of(row["created_at"]),
        started_at=time_or_none(row["started_at"]),
        ended_at=time_or_none(row["ended_at"]),
        expires_at=time_of(row["expires_at"]),
        webhook_url=row["webhook_url"],
        stop=row["stop"],
        num_total=row["num_total"],
        num_processing=row["num_processing"],
        num_succeeded=row["num_succeeded"],
        num_errored=row["num_errored"],
        num_canceled=row["num_canceled"],
        num_expired=row["num_expired"],
    )


def _rfc3339(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="seconds").replace("+00:00", "Z")
