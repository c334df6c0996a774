"""From a validated messages request to what the engine is asked. Interactive requests and those of a batch alike."""

from __future__ import annotations

import secrets

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.api.messages_request import MessagesRequest, ResponseFormat, Turn
from aiexport_edge.shim.catalog import Catalog, Listed
from aiexport_edge.shim.errors import InvalidRequest
from aiexport_edge.shim.store import Principal
from aiexport_edge.shim.telemetry import trace_context

DEFAULT_MAX_TOKENS = 1024
_SMALLEST_FLOAT32 = 1.2e-38  # a smaller top_p would arrive as 0, which the engine does not know: it is greedy
_ROLES = {"user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}


def generate_request(
    request: MessagesRequest,
    listed: Listed,
    principal: Principal,
    catalog: Catalog,
    request_id: str,
    priority: pb.Priority,
) -> pb.GenerateRequest:
    """The engine's request. Raises `InvalidRequest` where `max_tokens` is above the model's output limit, where
    JSON is asked of a model that does not promise it, and where images are for one that can't see.
    """
    if request.images:
        _check_vision(request.images[0].path, listed, catalog)
    messages = [pb.Message(role=_ROLES[turn.role], content=_blocks(turn)) for turn in request.turns]
    if request.system is not None:
        messages.insert(0, pb.Message(role=pb.ROLE_SYSTEM, content=[pb.ContentBlock(text=request.system)]))
    return pb.GenerateRequest(
        request_id=request_id,
        model=listed.spec.weights,
        adapter=listed.adapter,
        chat=pb.Chat(messages=messages),
        sampling=pb.SamplingParams(
            temperature=request.temperature,
            top_p=None if request.top_p is None else max(request.top_p, _SMALLEST_FLOAT32),
            top_k=request.top_k,
            seed=secrets.randbits(64) if request.seed is None else request.seed,
            stop_sequences=request.stop_sequences,
        ),
        max_tokens=_max_tokens(request.max_tokens, catalog.max_output_tokens(listed.spec)),
        tenant=pb.Tenant(
            id=principal.workspace_id, weight=catalog.weight(principal.plan), cache_salt=principal.cache_salt
        ),
        priority=priority,
        response_format=_response_format(request.response_format, listed),
        metadata=trace_context.get(),
    )


def _blocks(turn: Turn) -> list[pb.ContentBlock]:
    """An image's block has no source yet: it is named when an engine has taken the image."""
    parts = (turn.content,) if isinstance(turn.content, str) else turn.content
    return [
        pb.ContentBlock(text=part) if isinstance(part, str) else pb.ContentBlock(image=pb.Image()) for part in parts
    ]


def _check_vision(path: str, listed: Listed, catalog: Catalog) -> None:
    """Raises `InvalidRequest` where the model is known to see nothing."""
    if catalog.sees(listed.spec) is False:
        raise InvalidRequest(
            f"{path}: the model {listed.id} can't see images; send text, or use a model whose `vision` is true",
            param=path,
        )


def _response_format(wanted: ResponseFormat | None, listed: Listed) -> pb.ResponseFormat | None:
    if wanted is None:
        return None
    if not listed.spec.json_mode:
        raise InvalidRequest(
            f"response_format.type: JSON is promised on Sonnet and Opus models; {listed.id} is of the "
            f"{listed.spec.family.capitalize()} family, and the operator has not enabled it there",
            param="response_format.type",
        )
    if wanted.schema is None:
        return pb.ResponseFormat(json_object=pb.JsonObject())
    return pb.ResponseFormat(json_schema=wanted.schema)


def _max_tokens(wanted: int | None, limit: int | None) -> int | None:
    """The budget to ask for; None leaves it to the engine: the smaller of DEFAULT_MAX_TOKENS and the room left."""
    if limit is None:
        return wanted
    if wanted is None:
        return limit if limit < DEFAULT_MAX_TOKENS else None
    if wanted > limit:
        raise InvalidRequest(
            f"max_tokens: {wanted} is more than the {limit} tokens that this model may output", param="max_tokens"
        )
    return wanted
