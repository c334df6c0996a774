"""Errors: one schema, and a response for every status."""

from __future__ import annotations

from typing import Any

from aiexport_edge.shim.api.openapi.parts import record, ref

_ERRORS: dict[int, tuple[str, str, str]] = {
    400: ("invalid_request_error", "The request can't succeed as it is; `param` names the field.", "max_tokens"),
    401: ("authentication_error", "Credentials are missing, unknown, expired or revoked.", ""),
    403: ("permission_error", "The credentials' scopes or the workspace's plan do not allow it.", ""),
    404: ("not_found_error", "No such resource for this caller.", ""),
    409: ("conflict_error", "Not in a state for this just now; always safe to try again.", ""),
    413: ("request_too_large", "The body is over the limit.", ""),
    415: ("invalid_request_error", "The body is declared as something that is not read here.", ""),
    422: ("invalid_request_error", "The Idempotency-Key belongs to another path or body.", "Idempotency-Key"),
    429: ("rate_limit_error", "The workspace has used up its share for now.", ""),
    431: ("invalid_request_error", "The headers are over the limit.", ""),
    500: ("api_error", "Our own fault.", ""),
    503: ("overloaded_error", "Nothing can serve this just now; it has cost nothing.", ""),
}
_RETRY = (409, 429, 503)

SCHEMAS: dict[str, Any] = {
    "Error": record(
        {
            "type": {"const": "error"},
            "error": record(
                {
                    "type": {"type": "string", "enum": list(dict.fromkeys(kind for kind, _, _ in _ERRORS.values()))},
                    "message": {"type": "string", "description": "A sentence for a person."},
                    "param": {
                        "type": "string",
                        "description": "The field at fault, as a path: `messages.0.content.1.source.media_type`.",
                    },
                },
                optional=("param",),
            ),
            "request_id": {"type": "string", "pattern": "^req_[0-9a-v]{24}$"},
        }
    ),
    "OAuthError": record(
        {
            "error": {
                "type": "string",
                "enum": [
                    "invalid_request",
                    "invalid_client",
                    "unauthorized_client",
                    "unsupported_grant_type",
                    "invalid_scope",
                ],
            },
            "error_description": {"type": "string"},
        },
        optional=("error_description",),
        description="RFC 6749, section 5.2.",
    ),
}

HEADERS: dict[str, Any] = {
    "request-id": {"description": "Names this request.", "schema": {"type": "string", "pattern": "^req_[0-9a-v]{24}$"}},
    "x-request-id": {"description": "The same.", "schema": {"type": "string", "pattern": "^req_[0-9a-v]{24}$"}},
    "retry-after": {
        "description": "Seconds after which to try again.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "x-should-retry": {
        "description": "`false` where trying again soon can't help.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
    **{
        f"x-ratelimit-{what}-{of}": {
            "description": f"{said} Left out where {of} are unlimited.",
            "schema": {"type": "integer", "minimum": 0},
        }
        for of, period in (("requests", "minute"), ("tokens", "day"))
        for what, said in (
            ("limit", f"How many {of} the workspace may use in a {period}."),
            ("remaining", f"How many {of} are left."),
            ("reset", "Seconds until there is room again."),
        )
    },
}


def _response(status: int) -> dict[str, Any]:
    kind, description, param = _ERRORS[status]
    detail = {"type": kind, "message": description} | ({"param": param} if param else {})
    names = ["request-id", "x-request-id"] + (["retry-after", "x-should-retry"] if status in _RETRY else [])
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": {
            "application/json": {
                "schema": {
                    "allOf": [
                        ref("Error"),
                        {"properties": {"error": {"properties": {"type": {"const": kind}}}}},
                    ]
                },
                "example": {"type": "error", "error": detail, "request_id": "req_0123456789abcdefghijklmn"},
            }
        },
    }


RESPONSES: dict[str, Any] = {f"Error{status}": _response(status) for status in _ERRORS}


def errors(*statuses: int) -> dict[str, Any]:
    """The responses of these statuses, and of those that any call can get."""
    return {
        str(status): {"$ref": f"#/components/responses/Error{status}"} for status in sorted({*statuses, 431, 500, 503})
    }


def guarded(*statuses: int) -> dict[str, Any]:
    """The same where credentials are needed."""
    return errors(401, 403, 429, *statuses)
