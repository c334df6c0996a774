"""From the engine's error codes to what a REST client is told: one table."""

from __future__ import annotations

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.errors import ApiError, InternalError, InvalidRequest, Overloaded, RateLimited, internal_error

RETRY_AFTER_S = 2.0  # where the engine does not know better
_PARAMS = {
    "max_tokens": "max_tokens",
    "model": "model",
    "chat": "messages",
    "sampling": "",
    "response_format": "response_format",
}
_SCHEMA_FIELD = "response_format.json_schema"  # the schema itself, which REST has one level further down


def api_error(detail: pb.ErrorDetail) -> ApiError:
    """The client's view of a refusal, or of a failure after the 200."""
    retry_after = detail.retry_after_ms / 1000 or RETRY_AFTER_S
    match detail.code:
        case pb.ERROR_CONTEXT_LENGTH:
            # An engine stops counting where it is too much.
            length = f"at least {detail.actual}" if detail.actual > detail.limit else str(detail.actual)
            return InvalidRequest(
                f"messages: the prompt has {length} tokens and the context window of this model {detail.limit}, "
                "of which the reply needs at least one; shorten the conversation",
                param="messages",
            )
        case pb.ERROR_INVALID:
            return InvalidRequest(detail.message, param=_param(detail.field))
        case pb.ERROR_TENANT_QUEUE_FULL:
            return RateLimited(
                "This workspace has as many requests waiting as it may have; send this one again later.",
                retry_after=retry_after,
            )
        case pb.ERROR_QUEUE_FULL | pb.ERROR_NOT_FOUND:
            return Overloaded("The model has no room for this request just now.", retry_after=retry_after)
        case pb.ERROR_REVISION_CHANGED:
            return InternalError("The model was replaced while it was replying; send the request again.")
        case _:
            return internal_error()


def can_pass(detail: pb.ErrorDetail) -> bool:
    """Whether the same request may succeed a moment later, or on another engine."""
    return detail.code in (pb.ERROR_QUEUE_FULL, pb.ERROR_TENANT_QUEUE_FULL, pb.ERROR_NOT_FOUND)


def is_broken(detail: pb.ErrorDetail) -> bool:
    """Whether it is the engine's fault: another one may well take the request."""
    return detail.code in (pb.ERROR_INTERNAL, pb.ERROR_CODE_UNSPECIFIED)


def _param(field: str) -> str | None:
    """A path in GenerateRequest as the path in the REST body, where it has one."""
    if field == _SCHEMA_FIELD:
        return f"{_SCHEMA_FIELD}.schema"
    head, _, rest = field.partition(".")
    if head not in _PARAMS:
        return None
    return _PARAMS[head] or rest.partition(".")[0] or None
