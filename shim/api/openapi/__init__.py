"""The description of the REST API in OpenAPI 3.1, written as data: one module a resource, put together here.

Hand-written, so that it says what the contract says; tests walk the routes, the examples and real replies against it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from aiexport_edge.proto.version import API_VERSION
from aiexport_edge.shim.api.openapi import account, batches, errors, messages, models, service
from aiexport_edge.shim.api.openapi.parts import security_schemes

_DESCRIPTION = """\
One inference API for every model family: messages, streaming, batches and structured output, served from this machine.

Send the API key as `X-API-Key` with every request. Unknown request fields are ignored; `null` for an optional field \
is the same as leaving it out. Every reply carries a `request-id`. A JSON body may also be sent as `text/plain` or \
without a `Content-Type`.
"""


@cache
def document() -> dict[str, Any]:
    """The whole description. Shared: not to be changed."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "AI Export API",
            "version": API_VERSION,
            "description": _DESCRIPTION,
        },
        "servers": [{"url": "/", "description": "This installation"}],
        "tags": [
            {"name": "Messages", "description": "One reply to a conversation, whole or as a stream."},
            {"name": "Models", "description": "What can be used."},
            {"name": "Batches", "description": "Many messages, later, at half the price."},
            {"name": "Account", "description": "Keys, tokens and usage of the caller's workspace."},
            {"name": "Service", "description": "How this installation is doing. No key is needed."},
        ],
        "paths": {**messages.PATHS, **models.PATHS, **batches.PATHS, **account.PATHS, **service.PATHS},
        "webhooks": batches.WEBHOOKS,
        "components": {
            "schemas": {
                **messages.SCHEMAS,
                **models.SCHEMAS,
                **batches.SCHEMAS,
                **account.SCHEMAS,
                **service.SCHEMAS,
                **errors.SCHEMAS,
            },
            "responses": errors.RESPONSES,
            "headers": errors.HEADERS,
            "securitySchemes": security_schemes(),
        },
    }
