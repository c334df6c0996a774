"""Every error that a REST client can get: one tree, and the table from class to HTTP status and error type.

Owns the shape of an error reply. Does not know where errors arise, nor the engine's codes (`engines/refusals.py`).
Messages are sentences for a person; they never hold a stack trace, a file path or another workspace's data.
"""

from __future__ import annotations

from typing import Any

import msgspec

STORE_RETRY_S = 5.0


class ApiError(Exception):
    """A refusal or failure as the client sees it. `param` is the path of the field at fault.

    `retry_after` is in seconds; `headers` are sent besides those of every reply.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.headers = headers

    @property
    def status(self) -> int:
        return TABLE[type(self)][0]

    @property
    def type(self) -> str:
        return TABLE[type(self)][1]


class InvalidRequest(ApiError):
    """The request can never succeed as it is."""


class NotFetched(InvalidRequest):
    """A URL of the request brought nothing; asked again later, it might."""


class Unauthenticated(ApiError):
    """Credentials are missing, unknown, expired or revoked."""


class PermissionDenied(ApiError):
    """Right credentials, but their scopes or the workspace's plan do not allow it."""


class NotFound(ApiError):
    """No such resource for this caller."""


class MethodNotAllowed(ApiError):
    """The path exists, not with this method."""


class Conflict(ApiError):
    """The resource is not in a state for this just now; always safe to try again."""


class RequestTooLarge(ApiError):
    """The body is over the limit."""


class UnsupportedMediaType(ApiError):
    """The body is declared as something that is not JSON."""


class Unprocessable(ApiError):
    """An idempotency key that belongs to another request."""


class HeadTooLarge(ApiError):
    """The headers are over the limit."""


class RateLimited(ApiError):
    """The workspace has used up its share for now."""


class InternalError(ApiError):
    """Our own fault."""


class Overloaded(ApiError):
    """Nothing can serve this request just now; it has cost nothing."""


TABLE: dict[type[ApiError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request_error"),
    NotFetched: (400, "invalid_request_error"),
    Unauthenticated: (401, "authentication_error"),
    PermissionDenied: (403, "permission_error"),
    NotFound: (404, "not_found_error"),
    MethodNotAllowed: (405, "invalid_request_error"),
    Conflict: (409, "conflict_error"),
    RequestTooLarge: (413, "request_too_large"),
    UnsupportedMediaType: (415, "invalid_request_error"),
    Unprocessable: (422, "invalid_request_error"),
    RateLimited: (429, "rate_limit_error"),
    HeadTooLarge: (431, "invalid_request_error"),
    InternalError: (500, "api_error"),
    Overloaded: (503, "overloaded_error"),
}


def internal_error() -> InternalError:
    """What a client is told of a bug: nothing but the request id, which is in the reply anyway."""
    return InternalError("An internal error occurred. If it happens again, tell the operator this reply's request_id.")


def store_unavailable() -> Overloaded:
    """What a client is told while the store can't be written or read; the operator finds the remedy in the log."""
    return Overloaded("The server can't keep accounts just now; send the request again.", retry_after=STORE_RETRY_S)


def error_document(error: ApiError, request_id: str) -> dict[str, Any]:
    """The JSON object of an error reply or error event."""
    detail: dict[str, Any] = {"type": error.type, "message": error.message}
    if error.param is not None:
        detail["param"] = error.param
    return {"type": "error", "error": detail, "request_id": request_id}


def error_body(error: ApiError, request_id: str) -> bytes:
    """`error_document` as UTF-8 JSON."""
    return msgspec.json.encode(error_document(error, request_id))


def quoted(value: object, limit: int = 64) -> str:
    """A client's value for use inside a message: cut at `limit` characters, printable, encodable."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > limit:
        text = text[:limit] + "…"
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return f'"{text}"'
