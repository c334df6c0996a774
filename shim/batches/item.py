"""One request of a batch: what its element says, and the engine's request that it becomes.

The same reading serves when a batch is accepted and when it runs, so that what was found valid is what is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.api.generate_request import generate_request
from aiexport_edge.shim.api.messages_request import MessagesRequest, parse_messages_request
from aiexport_edge.shim.catalog import Catalog, Listed
from aiexport_edge.shim.errors import ApiError, InvalidRequest, NotFound
from aiexport_edge.shim.fields import Value
from aiexport_edge.shim.images.sources import ImageRules
from aiexport_edge.shim.json_body import JsonValue
from aiexport_edge.shim.store import Principal

MAX_CUSTOM_ID_CHARS = 64


@dataclass(frozen=True, slots=True)
class Item:
    """`path` is where the messages body stands, for errors."""

    custom_id: str | None
    request: MessagesRequest
    path: str


def read_item(element: JsonValue, path: str, images: ImageRules) -> Item:
    """An element of `requests`, flat or with `params`. Raises `InvalidRequest` with the place in its `param`."""
    fields = Value(element, path).object()
    custom_id = fields.read("custom_id", _custom_id)
    params = fields.get("params")
    body = fields if params is None else params.object()
    raw = {name: value for name, value in body.raw.items() if name != "stream"}
    with _at(body.path):
        return Item(custom_id, parse_messages_request(raw, images), body.path)


def engine_request(
    item: Item, catalog: Catalog, principal: Principal, request_id: str
) -> tuple[Listed, pb.GenerateRequest]:
    """What the engine is asked, below interactive work.

    Raises `InvalidRequest` (an unlisted model too) and `PermissionDenied`, with the place in `param`.
    """
    with _at(item.path):
        try:
            listed = catalog.use(item.request.model, principal)
        except NotFound as error:
            raise InvalidRequest(error.message, param=error.param) from None
        return listed, generate_request(item.request, listed, principal, catalog, request_id, pb.PRIORITY_BATCH)


def _custom_id(value: Value) -> str:
    text = value.text()
    if not 0 < len(text) <= MAX_CUSTOM_ID_CHARS:
        raise value.wrong(f"must have 1 to {MAX_CUSTOM_ID_CHARS} characters")
    if "\0" in text:  # PostgreSQL's texts hold none
        raise value.wrong("must not hold the character U+0000")
    return text


@contextmanager
def _at(path: str) -> Iterator[None]:
    """Errors of a messages body, with the place at which it stands put before theirs."""
    try:
        yield
    except ApiError as error:
        if path:
            param = f"{path}.{error.param}" if error.param else path
            said = error.message.removeprefix(f"{error.param}: ") if error.param else error.message
            error.message, error.param = f"{param}: {said}", param
        raise
