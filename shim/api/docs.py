"""`GET /openapi.json`, and `GET /docs`: the same as a page, made here. It fetches nothing and needs no script."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

_CACHE = {"cache-control": "public, max-age=300"}
_PAGE_HEADERS = {
    **_CACHE,
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
}
_CODE = re.compile(r"`([^`]+)`")


class Docs:
    """The two endpoints; neither needs a key."""

    async def openapi(self, _request: Request) -> Response:
        return Response(_json(), headers=_CACHE, media_type="application/json")

    async def page(self, _request: Request) -> Response:
        return Response(_page(), headers=_PAGE_HEADERS, media_type="text/html")


@cache
def _json() -> bytes:
    return json.dumps(_document(), ensure_ascii=False, separators=(",", ":")).encode()


def _document() -> dict[str, Any]:
    from aiexport_edge.shim.api.openapi import document  # large, and seldom asked for

    return document()


@cache
def _page() -> str:
    document = _document()
    operations = [
        (method, path, operation) for path, item in document["paths"].items() for method, operation in item.items()
    ]
    sections = []
    for tag in document["tags"]:
        mine = [each for each in operations if tag["name"] in each[2]["tags"]]
        parts = [_operation(document, *each) for each in mine]
        sections.append(f"<h2>{tag['name']}</h2><p>{_words(tag['description'])}</p>{''.join(parts)}")
    schemas = [
        f'<details id="{name}"><summary><b>{name}</b></summary>{_words_of(schema)}{_code(schema)}</details>'
        for name, schema in document["components"]["schemas"].items()
    ]
    info = document["info"]
    intro = "".join(f"<p>{_words(paragraph)}</p>" for paragraph in info["description"].split("\n\n"))
    return _TEMPLATE.format(
        title=html.escape(f"{info['title']} {info['version']}"),
        intro=intro,
        sections="\n".join(sections),
        schemas="\n".join(schemas),
    )


def _operation(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [_words_of(operation)]
    parameters = operation.get("parameters", [])
    if parameters:
        rows = "".join(
            f"<tr><td><code>{each['name']}</code></td><td>{each['in']}</td><td>{_kind(each['schema'])}</td>"
            f"<td>{_words(each.get('description', ''))}</td></tr>"
            for each in parameters
        )
        parts.append(f"<h4>Parameters</h4><table>{rows}</table>")
    for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<h4>Body: {_kind(content['schema'])}, <code>{media_type}</code></h4>")
        parts.append(_fields(document, content["schema"]))
        parts += [f"<p>{name}</p>{_code(example['value'])}" for name, example in content["examples"].items()]
    parts.append("<h4>Replies</h4>")
    for status, response in operation["responses"].items():
        parts.append(_response(status, _resolved(document, response)))
    summary = _words(operation["summary"])
    head = f'<span class="{method}">{method.upper()}</span> <code>{html.escape(path)}</code> {summary}'
    return f'<details id="{operation["operationId"]}"><summary>{head}</summary>{"".join(parts)}</details>'


def _response(status: str, response: dict[str, Any]) -> str:
    parts = []
    for media_type, content in response.get("content", {}).items():
        schema = content["schema"]
        inner = content.get("x-line-schema")
        kind = _kind(schema) if inner is None else f"{_kind(schema)} of {_kind(inner)}"
        parts.append(f"<p><code>{media_type}</code>: {kind} {_words(schema.get('description', ''))}</p>")
        if "example" in content:
            parts.append(_code(content["example"]))
    return f"<details><summary><b>{status}</b> {_words(response['description'])}</summary>{''.join(parts)}</details>"


def _fields(document: dict[str, Any], schema: dict[str, Any]) -> str:
    """The top-level fields of a body as a table."""
    schema = _resolved(document, schema)
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{name}</code></td><td>{'required' if name in required else ''}</td><td>{_kind(field)}</td>"
        f"<td>{_words(field.get('description', ''))}</td></tr>"
        for name, field in schema.get("properties", {}).items()
    )
    return f"<table>{rows}</table>" if rows else ""


def _kind(schema: dict[str, Any]) -> str:
    """A schema's type in a few words, with links to what it names."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#{name}">{name}</a>'
    for among in ("anyOf", "oneOf", "allOf"):
        if among in schema:
            return " or ".join(dict.fromkeys(_kind(each) for each in schema[among]))
    if "const" in schema:
        return f"<code>{html.escape(json.dumps(schema['const']))}</code>"
    if "enum" in schema:
        return " | ".join(f"<code>{html.escape(str(each))}</code>" for each in schema["enum"])
    kinds = schema.get("type", "anything")
    names = kinds if isinstance(kinds, list) else [kinds]
    limits = ", ".join(_limits(schema))
    text = " or ".join(f"array of {_kind(schema['items'])}" if n == "array" and "items" in schema else n for n in names)
    return f"{text} ({limits})" if limits else text


def _limits(schema: dict[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    signs |= {"minItems": "items ≥", "maxItems": "items ≤", "minLength": "characters ≥", "maxLength": "characters ≤"}
    for name, sign in signs.items():
        if name in schema:
            yield f"{sign} {schema[name]}"
    if "default" in schema:
        yield f"default {schema['default']}"


def _resolved(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` points at."""
    if "$ref" not in value:
        return value
    found: Any = document
    for step in value["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    resolved: dict[str, Any] = found
    return resolved


def _words_of(value: dict[str, Any]) -> str:
    return f"<p>{_words(value['description'])}</p>" if "description" in value else ""


def _words(text: str) -> str:
    """A description: escaped, with its `code`."""
    return _CODE.sub(r"<code>\1</code>", html.escape(text, quote=False))


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)
    return f"<pre>{html.escape(text, quote=False)}</pre>"


_TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
details {{ border: 1px solid #8884; border-radius: .4rem; margin: .5rem 0; padding: .4rem .8rem; }}
summary {{ cursor: pointer; }}
pre {{ overflow-x: auto; background: #8881; padding: .6rem; border-radius: .3rem; font-size: .85rem; }}
table {{ border-collapse: collapse; }} td {{ padding: .2rem .6rem .2rem 0; vertical-align: top; }}
.get, .post, .delete {{ display: inline-block; min-width: 4.2rem; font-weight: bold; }}
.get {{ color: #2a7; }} .post {{ color: #47d; }} .delete {{ color: #d44; }}
</style>
<h1>{title}</h1>
{intro}
<p><a href="/openapi.json">openapi.json</a> · <a href="/status">status</a></p>
{sections}
<h2>Schemas</h2>
{schemas}
</html>
"""
