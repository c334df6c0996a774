"""`/v2/batch`, and the webhook that tells of a batch's end."""

from __future__ import annotations

import json
from typing import Any

from aiexport_edge.proto.config_limits import MAX_BATCH_SIZE
from aiexport_edge.shim.api.openapi.errors import guarded
from aiexport_edge.shim.api.openapi.messages import MESSAGE_EXAMPLE, MESSAGE_FIELDS
from aiexport_edge.shim.api.openapi.parts import (
    IDEMPOTENCY_KEY,
    LIMIT,
    REPLAYED,
    TIME,
    after,
    json_body,
    json_content,
    nullable,
    page_of,
    path_id,
    record,
    ref,
    reply,
    secured,
)

_COUNT = {"type": "integer", "minimum": 0}
_COUNTS = ("total", "queued", "processing", "succeeded", "errored", "canceled", "expired")
_ID = "batch_0123456789abcdefghijklmn"
_EXAMPLE = {
    "id": _ID,
    "type": "batch",
    "status": "queued",
    "request_counts": {**dict.fromkeys(_COUNTS, 0), "total": 2, "queued": 2},
    "created_at": "2025-04-01T12:00:00Z",
    "started_at": None,
    "ended_at": None,
    "expires_at": "2025-04-02T12:00:00Z",
    "webhook_url": "https://hooks.example.com/batches",
}
_ENDED = {
    **_EXAMPLE,
    "status": "completed",
    "request_counts": {**dict.fromkeys(_COUNTS, 0), "total": 2, "succeeded": 2},
    "started_at": "2025-04-01T12:00:01Z",
    "ended_at": "2025-04-01T12:00:09Z",
}
_CUSTOM_ID = {
    "type": ["string", "null"],
    "minLength": 1,
    "maxLength": 64,
    "description": "The caller's own name for the request, unique in its batch.",
}
_ITEM_FIELDS = {name: schema for name, schema in MESSAGE_FIELDS.items() if name != "stream"}
_LINES = (
    "JSON Lines (`BatchResult`), in the order of the requests: "
    "the result of each, streamed as fast as the client takes them."
)

SCHEMAS: dict[str, Any] = {
    "BatchItem": {
        "description": "A body of `POST /v2/messages`, flat or as `params`; `stream` is ignored.",
        "anyOf": [
            {
                "type": "object",
                "properties": {"custom_id": _CUSTOM_ID, "params": {"type": "null"}, **_ITEM_FIELDS},
                "required": ["model", "messages"],
            },
            {
                "type": "object",
                "properties": {
                    "custom_id": _CUSTOM_ID,
                    "params": {"type": "object", "properties": _ITEM_FIELDS, "required": ["model", "messages"]},
                },
                "required": ["params"],
            },
        ],
    },
    "BatchRequest": {
        "type": "object",
        "properties": {
            "requests": {
                "type": "array",
                "minItems": 1,
                "maxItems": MAX_BATCH_SIZE,
                "items": ref("BatchItem"),
                "description": "At most as many as the plan's batch size.",
            },
            "webhook_url": {
                "type": ["string", "null"],
                "description": "Called when the batch ends, where the operator allows the address.",
            },
        },
        "required": ["requests"],
    },
    "Batch": record(
        {
            "id": {"type": "string", "pattern": "^batch_"},
            "type": {"const": "batch"},
            "status": {
                "type": "string",
                "enum": ["queued", "in_progress", "canceling", "canceled", "completed", "expired"],
            },
            "request_counts": record(dict.fromkeys(_COUNTS, _COUNT)),
            "created_at": TIME,
            "started_at": nullable(TIME),
            "ended_at": nullable(TIME),
            "expires_at": TIME,
            "webhook_url": {"type": ["string", "null"]},
        }
    ),
    "BatchPage": page_of("Batch"),
    "BatchResult": record(
        {
            "index": _COUNT,
            "custom_id": {"type": ["string", "null"]},
            "result": {
                "oneOf": [
                    record({"type": {"const": "succeeded"}, "message": ref("Message")}),
                    record(
                        {
                            "type": {"const": "errored"},
                            "error": {"$ref": "#/components/schemas/Error/properties/error"},
                        }
                    ),
                    record({"type": {"const": "canceled"}}),
                    record({"type": {"const": "expired"}}),
                ]
            },
        }
    ),
    "BatchEvent": record(
        {
            "type": {"type": "string", "enum": ["batch.completed", "batch.canceled", "batch.expired"]},
            "timestamp": TIME,
            "data": ref("Batch"),
        }
    ),
}

_RESULTS = "".join(
    json.dumps(line) + "\n"
    for line in (
        {"index": 0, "custom_id": None, "result": {"type": "succeeded", "message": MESSAGE_EXAMPLE}},
        {"index": 1, "custom_id": "second", "result": {"type": "canceled"}},
    )
)
_HELLO = {"model": "apex-haiku-4-20250401", "messages": [{"role": "user", "content": "Hello!"}]}
_BATCH = path_id("batch_id", "The batch's id. Another workspace's is a 404.")
_NEEDS = "Needs the scope `batch`."


def _operation(operation_id: str, summary: str, description: str, responses: dict[str, Any], **more: Any) -> Any:
    return {
        "operationId": operation_id,
        "tags": ["Batches"],
        "summary": summary,
        "description": f"{_NEEDS} {description}".strip(),
        "security": secured("batch"),
        **more,
        "responses": responses,
    }


PATHS: dict[str, Any] = {
    "/v2/batch": {
        "post": _operation(
            "createBatch",
            "Create a batch",
            "All of it is accepted, and durable before the 202, or nothing: one bad request is a 400 that names its "
            "place, such as `requests.17.model`.",
            {
                "202": reply("The batch, accepted.", json_content(ref("Batch"), _EXAMPLE), headers=REPLAYED),
                **guarded(400, 409, 413, 415, 422),
            },
            parameters=[IDEMPOTENCY_KEY],
            requestBody=json_body(
                ref("BatchRequest"),
                {
                    "flat": {"requests": [_HELLO, _HELLO]},
                    "with params": {
                        "requests": [{"custom_id": "first", "params": _HELLO}],
                        "webhook_url": "https://hooks.example.com/batches",
                    },
                },
            ),
            callbacks={
                "batchEnded": {"{$request.body#/webhook_url}": {"$ref": "#/webhooks/batchEnded"}},
            },
        ),
        "get": _operation(
            "listBatches",
            "List batches",
            "Newest first.",
            {
                "200": reply(
                    "A page of batches.",
                    json_content(
                        ref("BatchPage"), {"data": [_EXAMPLE], "first_id": _ID, "last_id": _ID, "has_more": False}
                    ),
                ),
                **guarded(400),
            },
            parameters=[LIMIT, after("batch's id")],
        ),
    },
    "/v2/batch/{batch_id}": {
        "get": _operation(
            "getBatch",
            "One batch",
            "",
            {"200": reply("The batch.", json_content(ref("Batch"), _EXAMPLE)), **guarded(404)},
            parameters=[_BATCH],
        )
    },
    "/v2/batch/{batch_id}/results": {
        "get": _operation(
            "getBatchResults",
            "The results of a batch that has ended",
            "Before its end: 409.",
            {
                "200": reply(
                    "One line for each request.",
                    {
                        "application/x-jsonl": {
                            "schema": {"type": "string", "description": _LINES},
                            "x-line-schema": ref("BatchResult"),
                            "example": _RESULTS,
                        }
                    },
                ),
                **guarded(404, 409),
            },
            parameters=[_BATCH],
        )
    },
    "/v2/batch/{batch_id}/cancel": {
        "delete": _operation(
            "cancelBatch",
            "Cancel a batch",
            "Finished requests keep their results. Does nothing where the batch has ended.",
            {
                "200": reply("The batch.", json_content(ref("Batch"), {**_EXAMPLE, "status": "canceling"})),
                **guarded(404),
            },
            parameters=[_BATCH],
        )
    },
}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": True, "description": description, "schema": schema}


WEBHOOKS: dict[str, Any] = {
    "batchEnded": {
        "post": {
            "operationId": "batchEnded",
            "tags": ["Batches"],
            "summary": "A batch has ended",
            "description": "Signed as Standard Webhooks says; tried again for 72 hours until a 2xx.",
            "security": [],
            "parameters": [
                _header("webhook-id", "The same on every try.", {"type": "string"}),
                _header("webhook-timestamp", "Seconds since 1970.", {"type": "string", "pattern": "^[0-9]+$"}),
                _header(
                    "webhook-signature",
                    "`v1,` and the base64 HMAC-SHA256 over `id.timestamp.body` with the workspace's `whsec_…` secret; "
                    "two of them, apart by a space, while the secret rotates.",
                    {"type": "string", "pattern": "^v1,"},
                ),
            ],
            "requestBody": json_body(
                ref("BatchEvent"),
                {"completed": {"type": "batch.completed", "timestamp": "2025-04-01T12:00:09Z", "data": _ENDED}},
            ),
            "responses": {"2XX": {"description": "Taken."}},
        }
    }
}
