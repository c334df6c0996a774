"""The body of a message request: every rule that does not depend on who asks or on which model is loaded.

What the vendor's page leaves open is decided here, after Anthropic's Messages API where that has an answer:
- content may not be empty (except a last assistant turn, which then prefills nothing); whitespace is content;
- the text blocks of one message are put together as they are; consecutive messages of one role are joined by a blank
  line; the text blocks of `system` are joined by a blank line too;
- `top_k: 0` is the same as leaving it out; `seed` is any unsigned 64-bit integer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from aiexport_edge.shim.fields import Object, Value
from aiexport_edge.shim.json_body import JsonValue

MAX_STOP_SEQUENCES = 16
MAX_STOP_SEQUENCE_CHARS = 256
MAX_SCHEMA_BYTES = 64 << 10  # of a `json_schema`
MAX_TOP_K = 2**31 - 1  # above any vocabulary, so clipping to it changes nothing
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
_REFUSED_FIELDS = ("tools", "tool_choice", "thinking")  # ignoring them would silently change the answer
_DATA_URL = re.compile(r"data:([a-z]+/[a-z.+-]+);base64,", re.ASCII)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says until the other speaks."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """The reply is to be a JSON object, and to satisfy `schema` (a JSON Schema's text) where there is one."""

    schema: str | None


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """A valid body. `turns` alternate, the first is the user's; a last one of the assistant is a prefill."""

    model: str
    turns: tuple[Turn, ...]
    system: str | None
    max_tokens: int | None
    temperature: float
    top_p: float | None
    top_k: int | None
    stop_sequences: tuple[str, ...]
    seed: int | None
    stream: bool
    response_format: ResponseFormat | None = None


def parse_messages_request(body: JsonValue) -> MessagesRequest:
    """Reads a parsed body. Raises `InvalidRequest` naming the first field that is wrong."""
    fields = Value(body, "").object()
    model = fields.require("model").text()
    turns = _turns(fields.require("messages"))
    for name in _REFUSED_FIELDS:
        refused = fields.get(name)
        if refused is not None:
            raise refused.wrong("is not supported here; leave it out")
    fields.read("metadata", Value.object)
    top_k = fields.read("top_k", lambda value: value.integer(0))
    temperature = fields.read(
        "temperature", lambda value: value.number(lambda number: 0 <= number <= 1, "a number from 0 to 1")
    )
    return MessagesRequest(
        model=model,
        turns=turns,
        system=fields.read("system", _system) or None,
        max_tokens=fields.read("max_tokens", lambda value: value.integer(1)),
        temperature=1.0 if temperature is None else temperature,
        top_p=fields.read(
            "top_p", lambda value: value.number(lambda number: 0 < number <= 1, "a number above 0, at most 1")
        ),
        top_k=min(top_k, MAX_TOP_K) if top_k else None,
        stop_sequences=fields.read("stop_sequences", _stop_sequences) or (),
        seed=fields.read("seed", lambda value: value.integer(0, 2**64 - 1)),
        stream=fields.read("stream", Value.boolean) or False,
        response_format=fields.read("response_format", _response_format),
    )


def _turns(messages: Value) -> tuple[Turn, ...]:
    if not messages.array():
        raise messages.wrong("must hold at least one message")
    num_messages = len(messages.array())
    turns: list[tuple[Literal["user", "assistant"], list[str]]] = []
    for index, message in enumerate(messages.items()):
        role, text = _message(message.object(), is_last=index == num_messages - 1)
        if index == 0 and role != "user":
            raise Value(role, f"{message.path}.role").wrong('must be "user": the first message is the user\'s')
        if role == "assistant" and not text:
            continue  # an empty prefill
        if turns and turns[-1][0] == role:
            turns[-1][1].append(text)
        else:
            turns.append((role, [text]))
    return tuple(Turn(role, "\n\n".join(texts)) for role, texts in turns)


def _message(message: Object, *, is_last: bool) -> tuple[Literal["user", "assistant"], str]:
    role_field = message.require("role")
    role_text = role_field.text()
    if role_text == "system":
        raise role_field.wrong('must be "user" or "assistant"; a system prompt goes into the top-level field "system"')
    role: Literal["user", "assistant"] = "user" if role_field.choice("user", "assistant") == "user" else "assistant"
    content = message.require("content")
    text = content.text() if isinstance(content.raw, str) else _blocks(content)
    if not text and not (role == "assistant" and is_last):
        raise content.wrong("must not be empty")
    return role, text


def _blocks(content: Value) -> str:
    if not isinstance(content.raw, list):
        raise content.wrong("must be a string or an array of content blocks")
    texts = []
    for block in content.items():
        fields = block.object()
        kind = fields.require("type")
        match kind.text():
            case "text":
                texts.append(fields.require("text").text())
            case "image":
                _image(fields.require("source").object())
                raise block.wrong("images can't be read: no model of this installation has vision")
            case _:
                raise kind.wrong('only content blocks of type "text" and "image" are known here')
    return "".join(texts)


def _image(source: Object) -> None:
    """The structure of an image block's source: base64 with its media type, or a URL (also a `data:` one)."""
    kind = source.require("type").choice("base64", "url")
    if kind == "base64":
        source.require("media_type").choice(*IMAGE_TYPES)
        source.require("data").text()
        return
    url = source.require("url")
    text = url.text()
    if text.startswith("data:"):
        declared = _DATA_URL.match(text)
        if declared is None or declared[1] not in IMAGE_TYPES:
            raise url.wrong(f"a data: URL must be base64 of {', '.join(IMAGE_TYPES)}")
    elif not text.startswith(("http://", "https://")):
        raise url.wrong("must be an http, https or data URL")


def _system(system: Value) -> str:
    if isinstance(system.raw, str):
        return system.text()
    if not isinstance(system.raw, list):
        raise system.wrong("must be a string or an array of text blocks")
    texts = []
    for block in system.items():
        fields = block.object()
        fields.require("type").choice("text")
        texts.append(fields.require("text").text())
    return "\n\n".join(texts)


def _stop_sequences(sequences: Value) -> tuple[str, ...]:
    if len(sequences.array()) > MAX_STOP_SEQUENCES:
        raise sequences.wrong(f"must hold at most {MAX_STOP_SEQUENCES} sequences")
    texts = []
    for sequence in sequences.items():
        text = sequence.text()
        if not text:
            raise sequence.wrong("must not be empty")
        if len(text) > MAX_STOP_SEQUENCE_CHARS:
            raise sequence.wrong(f"must have at most {MAX_STOP_SEQUENCE_CHARS} characters")
        texts.append(text)
    return tuple(texts)


def _response_format(value: Value) -> ResponseFormat | None:
    """None for plain text. What a schema says is the engine's to judge. `strict: false` is given what `true` is."""
    response_format = value.object()
    kind = response_format.require("type").choice("text", "json_object", "json_schema")
    if kind == "text":
        return None
    if kind == "json_object":
        return ResponseFormat(None)
    named = response_format.require("json_schema").object()
    named.require("name").text()
    schema = named.require("schema")
    text = json.dumps(schema.object().raw, separators=(",", ":"))
    named.read("strict", Value.boolean)
    if len(text) > MAX_SCHEMA_BYTES:
        raise schema.wrong(f"has {len(text)} bytes as compact JSON; at most {MAX_SCHEMA_BYTES} are taken")
    return ResponseFormat(text)
