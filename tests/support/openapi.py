"""Checks replies against the OpenAPI document, strictly: what it does not mention is an error."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import httpx
from jsonschema import Draft202012Validator, FormatChecker
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from aiexport_edge.shim.api.openapi import document

_URI = "urn:aiexport:openapi"


def closed(schema: Any) -> Any:
    """The schema with no room for properties that it does not name."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(value) for name, value in schema.items()}
    if inner.get("type") == "object" and "properties" in inner:
        inner.setdefault("additionalProperties", False)
    return inner


@cache
def _registry(*, strict: bool) -> Registry[Any]:
    contents = closed(document()) if strict else document()
    registry: Registry[Any] = Registry().with_resource(_URI, DRAFT202012.create_resource(contents))
    return registry


def validator(schema: dict[str, Any], *, strict: bool = False) -> Draft202012Validator:
    """For a schema of the document, whose references it follows."""

    def anchored(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: _URI + each if name == "$ref" and isinstance(each, str) else anchored(each)
                for name, each in value.items()
            }
        return [anchored(each) for each in value] if isinstance(value, list) else value

    schema = closed(schema) if strict else schema
    return Draft202012Validator(anchored(schema), registry=_registry(strict=strict), format_checker=FormatChecker())


def resolved(value: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` into the document points at."""
    if "$ref" not in value:
        return value
    found: Any = document()
    for step in value["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    return dict(found)


def operation_of(method: str, path: str) -> dict[str, Any]:
    """The operation that serves a request."""
    for pattern, item in document()["paths"].items():
        steps, given = pattern.split("/"), path.split("/")
        fits = len(steps) == len(given) and all(
            step == part or step.startswith("{") for step, part in zip(steps, given, strict=True)
        )
        if fits and method.lower() in item:
            return dict(item[method.lower()])
    raise AssertionError(f"{method} {path} is not described")


def check(reply: httpx.Response) -> None:
    """Fails unless the reply is one that the document describes."""
    operation = operation_of(reply.request.method, reply.request.url.path)
    status = str(reply.status_code)
    assert status in operation["responses"], f"{reply.request.url.path} does not describe a {status}: {reply.text}"
    response = resolved(operation["responses"][status])
    for name in ("request-id", "x-request-id"):
        assert name in reply.headers
    for name, header in response["headers"].items():
        if name in reply.headers:
            schema = resolved(header)["schema"]
            value: Any = reply.headers[name]
            validator(schema).validate(int(value) if schema.get("type") == "integer" else value)
    if "content" not in response:
        assert reply.content == b""
        return
    media_type = reply.headers["content-type"].partition(";")[0]
    assert media_type in response["content"], f"{media_type} of {status} is not described"
    content = response["content"][media_type]
    if media_type == "application/json":
        validator(content["schema"], strict=True).validate(reply.json())
    elif media_type == "text/event-stream":
        check_events(reply.text)
    elif media_type == "application/x-jsonl":
        for line in reply.text.splitlines():
            validator(content["x-line-schema"], strict=True).validate(json.loads(line))


def check_events(stream: str) -> None:
    """Each event as `ServerSentEvent` says, its JSON as `StreamEvent`."""
    sent = document()["components"]["schemas"]["ServerSentEvent"]
    for block in stream.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = {"event": name.removeprefix("event: "), "data": data.removeprefix("data: ")}
        validator(sent, strict=True).validate(event)
        content = json.loads(event["data"])
        assert content["type"] == event["event"]
        validator(sent["properties"]["data"]["contentSchema"], strict=True).validate(content)
