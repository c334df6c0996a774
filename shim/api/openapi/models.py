"""`GET /v2/models` and `/v2/models/{model_id}`, also under `/v1`."""

from __future__ import annotations

from typing import Any

from aiexport_edge.shim.api.models import FAMILIES
from aiexport_edge.shim.api.openapi.errors import guarded
from aiexport_edge.shim.api.openapi.parts import (
    LIMIT,
    TIME,
    after,
    json_content,
    page_of,
    path_id,
    query,
    record,
    ref,
    reply,
    secured,
)

_PRICE = {"type": "number", "minimum": 0, "description": "US dollars per million tokens."}
_SIZE = {"type": ["integer", "null"], "minimum": 1, "description": "Tokens; null until an engine has told it."}
_MODEL = {
    "id": "apex-haiku-4-20250401",
    "type": "model",
    "family": "haiku",
    "display_name": "Apex Haiku 4",
    "context_window": 100_000,
    "max_output_tokens": 8192,
    "vision": True,
    "pricing": {"input_per_million": 0.25, "output_per_million": 1.25},
    "created_at": "2025-04-01T00:00:00Z",
}

SCHEMAS: dict[str, Any] = {
    "Family": {"type": "string", "enum": list(FAMILIES)},
    "Model": record(
        {
            "id": {"type": "string"},
            "type": {"const": "model"},
            "family": ref("Family"),
            "display_name": {"type": "string"},
            "context_window": _SIZE,
            "max_output_tokens": _SIZE,
            "vision": {"type": "boolean"},
            "pricing": record({"input_per_million": _PRICE, "output_per_million": _PRICE}),
            "created_at": TIME,
        }
    ),
    "ModelPage": page_of("Model"),
}


def _list(operation_id: str) -> dict[str, Any]:
    return {
        "get": {
            "operationId": operation_id,
            "tags": ["Models"],
            "summary": "List the models that the caller may use",
            "description": "Needs the scope `messages`. Those that the plan allows, and the workspace's own.",
            "security": secured("messages"),
            "parameters": [query("family", ref("Family"), "Only models of this family."), LIMIT, after("model's id")],
            "responses": {
                "200": reply(
                    "A page of models.",
                    json_content(
                        ref("ModelPage"),
                        {"data": [_MODEL], "first_id": _MODEL["id"], "last_id": _MODEL["id"], "has_more": False},
                    ),
                ),
                **guarded(400),
            },
        }
    }


def _get(operation_id: str) -> dict[str, Any]:
    return {
        "get": {
            "operationId": operation_id,
            "tags": ["Models"],
            "summary": "One model",
            "description": "Needs the scope `messages`. One that the plan forbids is a 404.",
            "security": secured("messages"),
            "parameters": [path_id("model_id", "A model's id, or one without its date.")],
            "responses": {"200": reply("The model.", json_content(ref("Model"), _MODEL)), **guarded(404)},
        }
    }


PATHS: dict[str, Any] = {
    "/v2/models": _list("listModels"),
    "/v2/models/{model_id}": _get("getModel"),
    "/v1/models": _list("listModelsV1"),
    "/v1/models/{model_id}": _get("getModelV1"),
}
