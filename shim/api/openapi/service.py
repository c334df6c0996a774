"""`/healthz`, `/readyz`, `/status`, `/openapi.json`, `/docs`: no key is needed."""

from __future__ import annotations

from typing import Any

from aiexport_edge.proto.version import API_VERSION
from aiexport_edge.shim.api.openapi.errors import errors
from aiexport_edge.shim.api.openapi.parts import TIME, json_content, nullable, record, ref, reply

_STATE = {"type": "string", "enum": ["ready", "loading", "failed", "unavailable"]}
_MODEL = record({"id": {"type": "string"}, "family": ref("Family"), "state": _STATE})
_TIER = {"id": "apex-haiku-4-20250401", "family": "haiku", "state": "ready"}

SCHEMAS: dict[str, Any] = {
    "Readiness": record(
        {
            "status": {"type": "string", "enum": ["ready", "unavailable"]},
            "tiers": {"type": "array", "items": _MODEL},
        }
    ),
    "Status": record(
        {
            "status": {"type": "string", "enum": ["operational", "degraded", "down"]},
            "version": {"const": API_VERSION, "description": "Of the API."},
            "models": {"type": "array", "items": _MODEL},
            "engines": {
                **record({"total": {"type": "integer"}, "serving": {"type": "integer"}}),
                "description": "How many engines there are, and how many of them take requests.",
            },
            "availability_30d": {
                "type": ["number", "null"],
                "minimum": 0,
                "maximum": 1,
                "description": "The share of the period in which a model could be served; null until it is measured.",
            },
            "availability_period": {
                "type": "string",
                "enum": ["30 days", "since install"],
                "description": "What the share is of: until the installation is 30 days old, since it was installed.",
            },
            "availability_since": nullable(TIME),
            "first_token_p50_ms": {
                "type": ["integer", "null"],
                "description": "Milliseconds to the first text: the median of the last day's newest replies.",
            },
        }
    ),
}

_HTML = {"text/html": {"schema": {"type": "string"}}}


def _get(operation_id: str, summary: str, responses: dict[str, Any], description: str = "") -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": operation_id, "tags": ["Service"], "summary": summary}
    if description:
        operation["description"] = description
    return {"get": {**operation, "security": [], "responses": responses}}


def _ready(status: str, state: str) -> dict[str, Any]:
    return json_content(ref("Readiness"), {"status": status, "tiers": [{**_TIER, "state": state}]})


_NOT_READY = reply("No model can be served just now.", _ready("unavailable", "loading"), limited=False)

PATHS: dict[str, Any] = {
    "/healthz": _get(
        "getHealth",
        "Whether this process is up",
        {
            "200": reply("It is.", json_content(record({"status": {"const": "ok"}}), {"status": "ok"}), limited=False),
            **errors(),
        },
    ),
    "/readyz": _get(
        "getReadiness",
        "Whether at least one model can be served",
        {
            "200": reply("It can.", _ready("ready", "ready"), limited=False),
            **{**errors(), "503": _NOT_READY},
        },
    ),
    "/status": _get(
        "getStatus",
        "How this installation is doing",
        {
            "200": reply(
                "Its state, and what is recorded of the last 30 days.",
                {
                    **json_content(
                        ref("Status"),
                        {
                            "status": "operational",
                            "version": API_VERSION,
                            "models": [_TIER],
                            "engines": {"total": 2, "serving": 2},
                            "availability_30d": 0.9998,
                            "availability_period": "30 days",
                            "availability_since": "2025-04-01T12:00:00Z",
                            "first_token_p50_ms": 340,
                        },
                    ),
                    **_HTML,
                },
                limited=False,
            ),
            **errors(),
        },
        "A page; JSON where the `Accept` header asks for `application/json`.",
    ),
    "/openapi.json": _get(
        "getOpenApi",
        "This description",
        {
            "200": reply(
                "OpenAPI 3.1.",
                {"application/json": {"schema": {"type": "object", "required": ["openapi", "info", "paths"]}}},
                limited=False,
            ),
            **errors(),
        },
    ),
    "/docs": _get("getDocs", "This description as a page", {"200": reply("A page.", _HTML, limited=False), **errors()}),
}
