"""The shape of every listing: `limit` and `after_id` come in, `data`, `first_id`, `last_id` and `has_more` go out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request

from aiexport_edge.shim.errors import InvalidRequest, quoted

DEFAULT_LIMIT = 20
MAX_LIMIT = 100


def limit_of(request: Request) -> int:
    """`?limit=`, from 1 to `MAX_LIMIT`. Raises `InvalidRequest`."""
    text = request.query_params.get("limit")
    if text is None:
        return DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_LIMIT):
        raise InvalidRequest(f"limit: must be a number from 1 to {MAX_LIMIT}, not {quoted(text)}", param="limit")
    return int(text)


def after_id_of(request: Request, what: str) -> str | None:
    """`?after_id=`. Raises `InvalidRequest` for one that can name nothing: PostgreSQL's texts hold no U+0000."""
    text = request.query_params.get("after_id")
    if text is not None and "\0" in text:
        raise unknown_cursor(text, what)
    return text


def unknown_cursor(after_id: str, what: str) -> InvalidRequest:
    """The error for an `after_id` that names nothing that the caller can see."""
    return InvalidRequest(f"after_id: there is no {what} {quoted(after_id)}", param="after_id")


def page(data: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page of objects that each have an `id`."""
    return {
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
