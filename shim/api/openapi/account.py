"""`/v2/keys`, `/v2/oauth/token`, `/v2/usage`: what a workspace knows of itself."""

from __future__ import annotations

from typing import Any

from aiexport_edge.shim.api.keys import MAX_GRACE_S, MAX_LIFETIME_S
from aiexport_edge.shim.api.openapi.errors import errors, guarded
from aiexport_edge.shim.api.openapi.parts import (
    LIMIT,
    SCOPES,
    TIME,
    after,
    json_body,
    json_content,
    nullable,
    page_of,
    path_id,
    query,
    record,
    ref,
    reply,
    secured,
)
from aiexport_edge.shim.store.usage_sums import GROUPS

_SCOPE = {"type": "string", "enum": list(SCOPES)}
_KEY_FIELDS = {
    "id": {"type": "string", "pattern": "^key_"},
    "type": {"const": "api_key"},
    "scopes": {"type": "array", "items": _SCOPE, "minItems": 1},
    "test": {"type": "boolean"},
    "created_at": TIME,
    "expires_at": nullable(TIME),
}
_SECRET = {"type": "string", "pattern": "^axp_(live|test)_", "description": "Shown this once, and stored nowhere."}
_KEY = {
    "id": "key_0123456789abcdefghijklmn",
    "type": "api_key",
    "scopes": ["messages", "batch"],
    "test": False,
    "created_at": "2025-04-01T12:00:00Z",
    "expires_at": None,
}
_NEW_KEY = {**_KEY, "key": "axp_live_" + "x" * 43}
_DATE = {"type": "string", "format": "date"}
_COUNT = {"type": "integer", "minimum": 0}
_AMOUNTS = {
    "requests": {**_COUNT, "description": "Messages, those of batches too."},
    "input_tokens": _COUNT,
    "cache_read_input_tokens": _COUNT,
    "output_tokens": _COUNT,
    "cost_usd": {"type": "number", "minimum": 0},
}
_SPENT = {
    "requests": 12,
    "input_tokens": 3400,
    "cache_read_input_tokens": 0,
    "output_tokens": 1200,
    "cost_usd": 0.00235,
}

SCHEMAS: dict[str, Any] = {
    "Key": record(_KEY_FIELDS),
    "KeyPage": page_of("Key"),
    "NewKey": record({**_KEY_FIELDS, "key": _SECRET}),
    "RotatedKey": record({**_KEY_FIELDS, "key": _SECRET, "old_key_id": {"type": "string"}, "old_expires_at": TIME}),
    "UsageReport": record(
        {
            "data": {
                "type": "array",
                "items": record(
                    {"group": {"type": "string", "description": "A model's id, a key's id or a day."}, **_AMOUNTS}
                ),
                "description": "Only with `group_by`.",
            },
            "start": _DATE,
            "end": _DATE,
            "total": record(_AMOUNTS),
        },
        optional=("data",),
    ),
    "TokenRequest": {
        "type": "object",
        "properties": {
            "grant_type": {"const": "client_credentials"},
            "scope": {"type": "string", "description": "Apart by spaces; by default all that the client has."},
            "client_id": {"type": "string", "description": "Where it is not sent by HTTP Basic."},
            "client_secret": {"type": "string", "description": "Likewise."},
        },
        "required": ["grant_type"],
    },
    "Token": record(
        {
            "access_token": {"type": "string"},
            "token_type": {"const": "Bearer"},
            "expires_in": {"const": 3600},
            "scope": {"type": "string"},
        }
    ),
}

_KEY_ID = path_id("key_id", "The key's id. Another workspace's is a 404.")
_NO_STORE = {"cache-control": {"schema": {"const": "no-store"}}}


def _keys(operation_id: str, summary: str, description: str, responses: dict[str, Any], **more: Any) -> Any:
    return {
        "operationId": operation_id,
        "tags": ["Account"],
        "summary": summary,
        "description": f"Needs the scope `keys`. {description}",
        "security": secured("keys"),
        **more,
        "responses": responses,
    }


PATHS: dict[str, Any] = {
    "/v2/keys": {
        "get": _keys(
            "listKeys",
            "List this workspace's keys",
            "Newest first; deleted ones are left out.",
            {
                "200": reply(
                    "A page of keys.",
                    json_content(
                        ref("KeyPage"),
                        {"data": [_KEY], "first_id": _KEY["id"], "last_id": _KEY["id"], "has_more": False},
                    ),
                    headers=_NO_STORE,
                ),
                **guarded(400),
            },
            parameters=[LIMIT, after("key's id")],
        ),
        "post": _keys(
            "createKey",
            "Make a key",
            "It can have no scope that the caller's credentials have not.",
            {
                "201": reply("The key.", json_content(ref("NewKey"), _NEW_KEY), headers=_NO_STORE),
                **guarded(400, 413, 415),
            },
            requestBody=json_body(
                {
                    "type": "object",
                    "properties": {
                        "scopes": {
                            "type": ["array", "null"],
                            "items": _SCOPE,
                            "minItems": 1,
                            "description": "By default messages, batch and usage, as far as the caller has them.",
                        },
                        "expires_in": {
                            "anyOf": [
                                {"type": "integer", "minimum": 1, "maximum": MAX_LIFETIME_S},
                                {"type": "string", "pattern": "^[1-9][0-9]{0,8}[smhd]$"},
                                {"type": "null"},
                            ],
                            "description": 'Seconds, or a duration such as "90d".',
                        },
                    },
                },
                {"by default": {}, "for a while": {"scopes": ["messages"], "expires_in": "90d"}},
                required=False,
            ),
        ),
    },
    "/v2/keys/{key_id}": {
        "delete": _keys(
            "deleteKey",
            "End a key at once",
            "The caller's own too.",
            {"204": reply("It is over."), **guarded(404)},
            parameters=[_KEY_ID],
        )
    },
    "/v2/keys/{key_id}/rotate": {
        "post": _keys(
            "rotateKey",
            "Replace a key",
            "The old one goes on for the grace period, so that no request fails in between.",
            {
                "201": reply(
                    "The new key, and when the old one ends.",
                    json_content(
                        ref("RotatedKey"),
                        {
                            **_NEW_KEY,
                            "old_key_id": "key_nmlkjihgfedcba9876543210",
                            "old_expires_at": "2025-04-02T12:00:00Z",
                        },
                    ),
                    headers=_NO_STORE,
                ),
                **guarded(400, 404, 413, 415),
            },
            parameters=[_KEY_ID],
            requestBody=json_body(
                {
                    "type": "object",
                    "properties": {
                        "grace_seconds": {
                            "type": ["integer", "null"],
                            "minimum": 0,
                            "maximum": MAX_GRACE_S,
                            "description": "By default a day.",
                        }
                    },
                },
                {"an hour": {"grace_seconds": 3600}},
                required=False,
            ),
        )
    },
    "/v2/oauth/token": {
        "post": {
            "operationId": "createToken",
            "tags": ["Account"],
            "summary": "Get an access token",
            "description": "OAuth 2.0 client credentials (RFC 6749, section 4.4), for workspaces on Enterprise.",
            "security": [{"ClientSecret": []}, {}],
            "requestBody": {
                "required": True,
                "content": {
                    "application/x-www-form-urlencoded": {
                        "schema": ref("TokenRequest"),
                        "examples": {
                            "all scopes": {"value": {"grant_type": "client_credentials"}},
                            "in the body": {
                                "value": {
                                    "grant_type": "client_credentials",
                                    "scope": "messages",
                                    "client_id": "client_0123456789abcdefghijklmn",
                                    "client_secret": "…",
                                }
                            },
                        },
                    }
                },
            },
            "responses": {
                "200": reply(
                    "The token.",
                    json_content(
                        ref("Token"),
                        {"access_token": "eyJ…", "token_type": "Bearer", "expires_in": 3600, "scope": "messages batch"},
                    ),
                    limited=False,
                    headers=_NO_STORE,
                ),
                "400": reply(
                    "The grant is refused, or the body did not arrive.",
                    json_content(
                        {"anyOf": [ref("OAuthError"), ref("Error")]},
                        {"error": "unsupported_grant_type", "error_description": "grant_type must be …"},
                    ),
                    limited=False,
                ),
                "401": reply(
                    "The client is unknown, or its secret wrong.",
                    json_content(ref("OAuthError"), {"error": "invalid_client"}),
                    limited=False,
                    headers={"www-authenticate": {"schema": {"type": "string"}}},
                ),
                **errors(413, 415),
            },
        }
    },
    "/v2/usage": {
        "get": {
            "operationId": "getUsage",
            "tags": ["Account"],
            "summary": "What this workspace has used",
            "description": "Needs the scope `usage`. Days of UTC, both inclusive; by default the last 30.",
            "security": secured("usage"),
            "parameters": [
                query("start", _DATE, "The first day."),
                query("end", _DATE, "The last day."),
                query("group_by", {"type": "string", "enum": list(GROUPS)}, "Without it there is only the total."),
            ],
            "responses": {
                "200": reply(
                    "Sums over the days.",
                    json_content(
                        ref("UsageReport"),
                        {
                            "data": [{"group": "apex-haiku-4-20250401", **_SPENT}],
                            "start": "2025-04-01",
                            "end": "2025-04-30",
                            "total": _SPENT,
                        },
                    ),
                ),
                **guarded(400),
            },
        }
    },
}
