"""The body of a message request: every rule that does not depend on who asks or on which model is loaded.

What the vendor's page leaves open is decided here, after Anthropic's Messages API where that has an answer:
- content may not be empty (except a last assistant turn, which then prefills nothing); whitespace is content;
- the text blocks of one message are put together as they are; consecutive messages of one role are joined by a blank
  line; the text blocks of `system` are joined by a blank line too;
- images stand in messages of the user; those, texts and joined messages keep their order;
- `top_k: 0` is the same as leaving it out; `top_p: 0` leaves the likeliest token alone, as any `top_p` does that is
  smaller than that token's share; `seed` is any unsigned 64-bit integer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, TypeAlias

from aiexport_edge.proto.config_images import ImagesConfig
from aiexport_edge.shim.fields import Object, Value
from aiexport_edge.shim.images.sources import ImageRules, ImageSource
from aiexport_edge.shim.json_body import JsonValue

MAX_STOP_SEQUENCES = 16
MAX_STOP_SEQUENCE_CHARS = 256
MAX_SCHEMA_BYTES = 64 << 10  # of a `json_schema`
MAX_TOP_K = 2**31 - 1  # above any vocabulary, so clipping to it changes nothing
_REFUSED_FIELDS = ("tools", "tool_choice", "thinking")  # ignoring them would silently change the answer
_ANY_IMAGES = ImageRules(ImagesConfig())


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says until the other speaks."""

    role: Literal["user", "assistant"]
    content: str | tuple[str | ImageSource, ...]


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

    @property
    def images(self) -> list[ImageSource]:
        """All of them, in their order."""
        several = (turn.content for turn in self.turns if not isinstance(turn.content, str))  # not a text's characters
        return [part for content in several for part in content if not isinstance(part, str)]


def parse_messages_request(body: JsonValue, images: ImageRules = _ANY_IMAGES) -> MessagesRequest:
    """Reads a parsed body. Raises `InvalidRequest` naming the first field that is wrong."""
    fields = Value(body, "").object()
    model = fields.require("model").text()
    turns = _turns(fields.require("messages"), images)
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
        top_p=fields.read("top_p", lambda value: value.number(lambda number: 0 <= number <= 1, "a number from 0 to 1")),
        top_k=min(top_k, MAX_TOP_K) if top_k else None,
        stop_sequences=fields.read("stop_sequences", _stop_sequences) or (),
        seed=fields.read("seed", lambda value: value.integer(0, 2**64 - 1)),
        stream=fields.read("stream", Value.boolean) or False,
        response_format=fields.read("response_format", _response_format),
    )


_Parts: TypeAlias = "list[str | ImageSource]"


def _turns(messages: Value, images: ImageRules) -> tuple[Turn, ...]:
    if not messages.array():
        raise messages.wrong("must hold at least one message")
    num_messages = len(messages.array())
    num_images = 0
    turns: list[tuple[Literal["user", "assistant"], _Parts]] = []
    for index, message in enumerate(messages.items()):
        role, parts = _message(message.object(), images, is_last=index == num_messages - 1)
        if index == 0 and role != "user":
            raise Value(role, f"{message.path}.role").wrong('must be "user": the first message is the user\'s')
        for part in parts:
            if not isinstance(part, str):
                num_images += 1
                images.check_count(part.path, num_images)
        if role == "assistant" and not parts:
            continue  # an empty prefill
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(["\n\n", *parts])
        else:
            turns.append((role, parts))
    return tuple(Turn(role, _content(parts)) for role, parts in turns)


def _content(parts: _Parts) -> str | tuple[str | ImageSource, ...]:
    """Texts that follow each other put together."""
    content: _Parts = []
    for part in parts:
        if content and isinstance(part, str) and isinstance(content[-1], str):
            content[-1] += part
        else:
            content.append(part)
    only = content[0] if len(content) == 1 else None
    return only if isinstance(only, str) else tuple(content)


def _message(message: Object, images: ImageRules, *, is_last: bool) -> tuple[Literal["user", "assistant"], _Parts]:
    """Its texts and images; no empty texts."""
    role_field = message.require("role")
    role_text = role_field.text()
    if role_text == "system":
        raise role_field.wrong('must be "user" or "assistant"; a system prompt goes into the top-level field "system"')
    role: Literal["user", "assistant"] = "user" if role_field.choice("user", "assistant") == "user" else "assistant"
    content = message.require("content")
    parts = [content.text()] if isinstance(content.raw, str) else _blocks(content, images, of_user=role == "user")
    parts = [part for part in parts if part]
    if not parts and not (role == "assistant" and is_last):
        raise content.wrong("must not be empty")
    return role, parts


def _blocks(content: Value, images: ImageRules, *, of_user: bool) -> _Parts:
    if not isinstance(content.raw, list):
        raise content.wrong("must be a string or an array of content blocks")
    parts: _Parts = []
    for block in content.items():
        fields = block.object()
        kind = fields.require("type")
        match kind.text():
            case "text":
                parts.append(fields.require("text").text())
            case "image" if of_user:
                parts.append(images.read(block))
            case "image":
                raise block.wrong('images stand in messages of the role "user"')
            case "video":
                raise block.wrong("video can't be read here; send single pictures as image blocks")
            case _:
                raise kind.wrong('only content blocks of type "text" and "image" are known here')
    return parts


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
    text = json.dumps(schema.object().raw, separators=(",", ":"), default=lambda long: long.text)
    named.read("strict", Value.boolean)
    if len(text) > MAX_SCHEMA_BYTES:
        raise schema.wrong(f"has {len(text)} bytes as compact JSON; at most {MAX_SCHEMA_BYTES} are taken")
    return ResponseFormat(text)
