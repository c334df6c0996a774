"""What every part of the description is put together from. Knows no resource."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SCOPES = {
    "messages": "Messages and models",
    "batch": "Batches",
    "usage": "Usage",
    "keys": "This workspace's keys",
}
TIME = {"type": "string", "format": "date-time", "description": "RFC 3339, in UTC."}


def ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, or null."""
    if isinstance(schema.get("type"), str) and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [schema, {"type": "null"}]}


def record(properties: dict[str, Any], *, optional: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """An object of a reply: every property is there, but for the `optional` ones."""
    required = [name for name in properties if name not in tuple(optional)]
    return {"type": "object", "properties": properties, "required": required, **more}


def page_of(name: str) -> dict[str, Any]:
    """A listing's page."""
    cursor = {"type": ["string", "null"], "description": "The id of the page's first or last object; null on none."}
    return record(
        {
            "data": {"type": "array", "items": ref(name)},
            "first_id": cursor,
            "last_id": cursor,
            "has_more": {"type": "boolean", "description": "Whether `after_id` with `last_id` gives more."},
        }
    )


def secured(scope: str) -> list[dict[str, list[str]]]:
    """Any one of the ways to say who asks; the credentials need `scope`."""
    return [{"ApiKey": []}, {"Bearer": []}, {"OAuth2": [scope]}]


def security_schemes() -> dict[str, Any]:
    return {
        "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "`axp_live_…`, `axp_test_…`"},
        "Bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or an OAuth 2.0 access token."},
        "OAuth2": {
            "type": "oauth2",
            "description": "Client credentials, for workspaces on the Enterprise plan.",
            "flows": {"clientCredentials": {"tokenUrl": "/v2/oauth/token", "scopes": SCOPES}},
        },
        "ClientSecret": {"type": "http", "scheme": "basic", "description": "The OAuth client's id and secret."},
    }


def json_body(schema: dict[str, Any], examples: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    """A request body. `examples`: by name, each its value."""
    return {
        "required": required,
        "content": {
            "application/json": {
                "schema": schema,
                "examples": {name: {"value": value} for name, value in examples.items()},
            }
        },
    }


def reply(
    description: str,
    content: dict[str, Any] | None = None,
    *,
    limited: bool = True,
    headers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A reply; `limited`: it may carry the `X-RateLimit-…` headers."""
    names = ["request-id", "x-request-id"]
    if limited:
        names += [
            f"x-ratelimit-{what}-{of}" for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")
        ]
    response: dict[str, Any] = {
        "description": description,
        "headers": {**{name: {"$ref": f"#/components/headers/{name}"} for name in names}, **(headers or {})},
    }
    if content is not None:
        response["content"] = content
    return response


def json_content(schema: dict[str, Any], example: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema, "example": example}}


def query(name: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema, "description": description}


def path_id(name: str, description: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}, "description": description}


LIMIT = query("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}, "Page size.")


def after(what: str) -> dict[str, Any]:
    return query("after_id", {"type": "string", "minLength": 1}, f"Goes on after this {what}; an unknown one is a 400.")


IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": r"^[\x20-\x7e]+$"},
    "description": (
        "Does the request once: a final 2xx is replayed for 24 hours to the same workspace, unbilled, a stream as its "
        "events, with the header `idempotent-replayed: true`. While the first is running: 409. With another path or "
        "body: 422. Anything but a whole 2xx frees the key."
    ),
}
REPLAYED = {
    "idempotent-replayed": {
        "description": "There where this is the kept reply of an earlier request.",
        "schema": {"type": "string", "const": "true"},
    }
}
