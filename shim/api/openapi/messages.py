"""`POST /v2/messages`, `/v2/messages/stream`, `/v1/messages`."""

from __future__ import annotations

from typing import Any

from aiexport_edge.shim.api.messages_request import (
    MAX_STOP_SEQUENCE_CHARS,
    MAX_STOP_SEQUENCES,
)
from aiexport_edge.shim.api.openapi.errors import guarded
from aiexport_edge.shim.api.openapi.parts import (
    IDEMPOTENCY_KEY,
    REPLAYED,
    json_body,
    json_content,
    record,
    ref,
    reply,
    secured,
)
from aiexport_edge.shim.images.sources import MEDIA_TYPES

_TOKENS = {"type": "integer", "minimum": 0}
_TEXT_BLOCK = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_MEDIA_TYPES = "|".join(kind.removeprefix("image/") for kind in MEDIA_TYPES)

MESSAGE_FIELDS: dict[str, Any] = {
    "model": {
        "type": "string",
        "description": (
            "An id that `GET /v2/models` lists, or one without its date for the newest of that name, or "
            "`ft-{workspace}-{model-id}` of the caller's own workspace. An unlisted one is a 404."
        ),
    },
    "messages": {
        "type": "array",
        "minItems": 1,
        "items": ref("InputMessage"),
        "description": (
            "The conversation. The first is the user's; consecutive ones of one role are joined; a last one of the "
            "assistant is the beginning of the reply, which goes on from there."
        ),
    },
    "max_tokens": {
        "type": ["integer", "null"],
        "minimum": 1,
        "description": (
            "The most tokens to generate; above the model's output limit it is a 400, above the room left in the "
            "context it is clipped. By default the smaller of 1024 and the room left."
        ),
    },
    "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 1, "description": "0 is greedy. Default 1.0."},
    "top_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
    "top_k": {"type": ["integer", "null"], "minimum": 0, "description": "0 is the same as leaving it out."},
    "stop_sequences": {
        "type": ["array", "null"],
        "maxItems": MAX_STOP_SEQUENCES,
        "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_SEQUENCE_CHARS},
    },
    "seed": {
        "type": ["integer", "null"],
        "minimum": 0,
        "maximum": 2**64 - 1,
        "description": "The same seed and request give the same text, as far as the model's arithmetic allows.",
    },
    "system": {
        "anyOf": [{"type": "string"}, {"type": "array", "items": ref("TextBlock")}, {"type": "null"}],
        "description": "Put before the conversation.",
    },
    "stream": {"type": ["boolean", "null"], "description": "Whether the reply comes as server-sent events."},
    "response_format": {"anyOf": [ref("ResponseFormat"), {"type": "null"}]},
    "metadata": {"type": ["object", "null"], "description": "Not used."},
    **{
        name: {"type": "null", "description": "Not supported: anything but null is a 400."}
        for name in ("tools", "tool_choice", "thinking")
    },
}

_ID = {"type": "string", "pattern": "^msg_"}
_USAGE_EXAMPLE = {"input_tokens": 12, "cache_read_input_tokens": 0, "output_tokens": 9}
MESSAGE_EXAMPLE = {
    "id": "msg_0123456789abcdefghijklmn",
    "type": "message",
    "role": "assistant",
    "model": "apex-sonnet-4-20250501",
    "content": [{"type": "text", "text": "Hello! How can I help you today?"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": _USAGE_EXAMPLE,
}

_STREAM_WORDS = (
    "Server-sent events, each with an `event:` line and one `data:` line of JSON (`StreamEvent`): `message_start` "
    "(once the request is scheduled), `content_block_start`, any number of `content_block_delta`, "
    "`content_block_stop`, `message_delta`, `message_stop`; the deltas' texts together are the reply. "
    "`ping` whenever 10 seconds pass without an event. A failure after the first byte is an `error` event, then the "
    "end."
)


def _event(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    return record({"type": {"const": name}, **properties})


SCHEMAS: dict[str, Any] = {
    "TextBlock": _TEXT_BLOCK,
    "ImageBlock": {
        "type": "object",
        "description": (
            "In a message of the user, for a model whose `vision` is true; else a 400. A picture is turned as its EXIF "
            "data say, transparency becomes white, and of an animation the first frame counts. One that is broken, not "
            "of its declared type or larger than the operator allows is a 400 whose `param` is its block, such as "
            "`messages.0.content.1`. Video is not taken."
        ),
        "properties": {
            "type": {"const": "image"},
            "source": {
                "oneOf": [
                    {
                        "type": "object",
                        "properties": {
                            "type": {"const": "base64"},
                            "media_type": {"type": "string", "enum": list(MEDIA_TYPES)},
                            "data": {
                                "type": "string",
                                "contentEncoding": "base64",
                                "minLength": 1,
                                "description": "The file, of at most 10 MiB unless the operator says otherwise.",
                            },
                        },
                        "required": ["type", "media_type", "data"],
                    },
                    {
                        "type": "object",
                        "properties": {
                            "type": {"const": "url"},
                            "url": {
                                "type": "string",
                                "pattern": rf"^(https?://|data:image/({_MEDIA_TYPES});base64,)",
                                "description": (
                                    "A `data:` URL, or one of a host that the operator allows: fetched once, redirects "
                                    "not followed, its `Content-Type` one of those above. In a batch it is fetched "
                                    "when the request runs."
                                ),
                            },
                        },
                        "required": ["type", "url"],
                    },
                ]
            },
        },
        "required": ["type", "source"],
    },
    "InputMessage": {
        "type": "object",
        "properties": {
            "role": {"type": "string", "enum": ["user", "assistant"]},
            "content": {
                "description": "Not empty, but for a last message of the assistant.",
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"anyOf": [ref("TextBlock"), ref("ImageBlock")]}},
                ],
            },
        },
        "required": ["role", "content"],
    },
    "ResponseFormat": {
        "description": (
            "`json_object`: the reply's text parses as one JSON object, always, also where `max_tokens` ends it; on "
            "Sonnet and Opus models and fine-tunes of them. `json_schema`: and it is valid against the schema."
        ),
        "oneOf": [
            {"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"]},
            {"type": "object", "properties": {"type": {"const": "json_object"}}, "required": ["type"]},
            {
                "type": "object",
                "properties": {
                    "type": {"const": "json_schema"},
                    "json_schema": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "schema": {"type": "object", "description": "JSON Schema; `$ref` is never fetched."},
                            "strict": {"type": ["boolean", "null"]},
                        },
                        "required": ["name", "schema"],
                    },
                },
                "required": ["type", "json_schema"],
            },
        ],
    },
    "MessageRequest": {
        "type": "object",
        "properties": MESSAGE_FIELDS,
        "required": ["model", "messages"],
    },
    "Usage": record(
        {
            "input_tokens": {**_TOKENS, "description": "Everything that was read, less what the prefix cache held."},
            "cache_read_input_tokens": {**_TOKENS, "description": "Prompt tokens that the prefix cache held."},
            "output_tokens": _TOKENS,
        }
    ),
    "StopReason": {"type": "string", "enum": ["end_turn", "max_tokens", "stop_sequence"]},
    "Message": record(
        {
            "id": _ID,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": {"type": "string", "description": "The id that was asked for."},
            "content": {"type": "array", "items": ref("TextBlock"), "minItems": 1, "maxItems": 1},
            "stop_reason": ref("StopReason"),
            "stop_sequence": {"type": ["string", "null"]},
            "usage": ref("Usage"),
        }
    ),
    "ServerSentEvent": record(
        {
            "event": {"type": "string", "description": "The same as the `type` in its data."},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": ref("StreamEvent"),
            },
        },
        description=_STREAM_WORDS,
    ),
    "StreamEvent": {
        "description": "The JSON of a `data:` line; the `event:` line before it says its `type`.",
        "oneOf": [
            ref(name)
            for name in (
                "MessageStart",
                "ContentBlockStart",
                "ContentBlockDelta",
                "ContentBlockStop",
                "MessageDelta",
                "MessageStop",
                "Ping",
                "Error",
            )
        ],
    },
    "MessageStart": _event(
        "message_start",
        {
            "message": record(
                {
                    "id": _ID,
                    "type": {"const": "message"},
                    "role": {"const": "assistant"},
                    "model": {"type": "string"},
                    "content": {"type": "array", "maxItems": 0},
                    "stop_reason": {"type": "null"},
                    "stop_sequence": {"type": "null"},
                    "usage": ref("Usage"),
                }
            )
        },
    ),
    "ContentBlockStart": _event(
        "content_block_start",
        {"index": {"const": 0}, "content_block": record({"type": {"const": "text"}, "text": {"const": ""}})},
    ),
    "ContentBlockDelta": _event(
        "content_block_delta",
        {"index": {"const": 0}, "delta": record({"type": {"const": "text_delta"}, "text": {"type": "string"}})},
    ),
    "ContentBlockStop": _event("content_block_stop", {"index": {"const": 0}}),
    "MessageDelta": _event(
        "message_delta",
        {
            "delta": record({"stop_reason": ref("StopReason"), "stop_sequence": {"type": ["string", "null"]}}),
            "usage": record({"output_tokens": _TOKENS}),
        },
    ),
    "MessageStop": _event("message_stop", {}),
    "Ping": _event("ping", {}),
}

_HELLO = {
    "model": "apex-sonnet-4-20250501",
    "max_tokens": 1024,
    "messages": [{"role": "user", "content": "Hello!"}],
}
_JSON_MODE = {
    "model": "apex-sonnet-4-20250501",
    "max_tokens": 200,
    "messages": [{"role": "user", "content": "Describe a fox as JSON with name and age."}],
    "response_format": {"type": "json_object"},
}
_FULL = {
    "model": "apex-opus-3-20250401",
    "max_tokens": 300,
    "system": "Answer briefly.",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Name a colour."}]},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Another one."},
    ],
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "stop_sequences": ["END"],
    "seed": 7,
}
_STREAM_EXAMPLE = (
    'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_0123456789abcdefghijklmn",'
    '"type":"message","role":"assistant","model":"apex-opus-3-20250401","content":[],"stop_reason":null,'
    '"stop_sequence":null,"usage":{"input_tokens":12,"cache_read_input_tokens":0,"output_tokens":0}}}\n\n'
    'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
    '"content_block":{"type":"text","text":""}}\n\n'
    'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    '"delta":{"type":"text_delta","text":"Hello"}}\n\n'
    'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
    'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
    '"usage":{"output_tokens":1}}\n\n'
    'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
_STREAM = {
    "text/event-stream": {
        "schema": ref("ServerSentEvent"),  # of each event; only OpenAPI 3.2 has a place for that of its own
        "example": _STREAM_EXAMPLE,
    }
}
_ERRORS = guarded(400, 404, 409, 413, 415, 422)


def _operation(operation_id: str, summary: str, content: dict[str, Any], examples: dict[str, Any]) -> dict[str, Any]:
    return {
        "post": {
            "operationId": operation_id,
            "tags": ["Messages"],
            "summary": summary,
            "description": "Needs the scope `messages`. A client that disconnects ends its request.",
            "security": secured("messages"),
            "parameters": [IDEMPOTENCY_KEY],
            "requestBody": json_body(ref("MessageRequest"), examples),
            "responses": {"200": reply("The reply.", content, headers=REPLAYED), **_ERRORS},
        }
    }


_EITHER = {**json_content(ref("Message"), MESSAGE_EXAMPLE), **_STREAM}
_EXAMPLES = {"hello": _HELLO, "everything": _FULL, "json": _JSON_MODE}

PATHS: dict[str, Any] = {
    "/v2/messages": _operation("createMessage", "Create a message", _EITHER, _EXAMPLES),
    "/v2/messages/stream": _operation(
        "streamMessage", "Create a message, streamed whatever `stream` says", _STREAM, {"stream": _HELLO}
    ),
    "/v1/messages": _operation(
        "createMessageV1", "The same, at the path that the Anthropic SDKs use", _EITHER, {"hello": _HELLO}
    ),
}
