"""Messages to prompt text by the model's own chat template, so that nothing a client writes becomes a control token.

Owns the jinja environment and the default for models without a template. The template is the operator's, run in
jinja's immutable sandbox; message texts are the client's.

How the two are kept apart: before rendering, the characters with which a control token's spelling can begin or end
(`<`, `>`, …) are replaced, in the clients' texts alone, by private-use characters that occur nowhere in them, drawn
anew each time. In what the template then renders, every control token spelled out is the template's own work; it is
renamed to its alias (`Tokenizer.alias`), and the replaced characters are put back. One character stands for one
character, so a template may trim, split, measure and inspect texts as it likes. The one thing it no longer sees is
control markup in a client's text (`</think>`, `<tool_response>`): that stays text, which is the point.
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aiexport_edge.engine.text.tokenizer import Tokenizer, TokenizerError, TooManyTokens, read_json

_PRIVATE = range(0xF0000, 0xFFFFD)  # plane 15, private use
_SEPARATOR = "\n\n"
_PROBE = "q7Zk"


class TemplateError(Exception):
    """These messages cannot be rendered; the message is a sentence for the client."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Stands where a picture does in a message; in the prompt it takes `num_tokens`, its borders aside."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. The texts in `content` are the client's; pictures stand in a user's message only."""

    role: Literal["system", "user", "assistant"]
    content: str | tuple[str | Picture, ...]

    @property
    def text(self) -> str:
        """All texts of it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def pictures(self) -> list[Picture]:
        """In their order."""
        if isinstance(self.content, str):  # not character by character
            return []
        return [part for part in self.content if isinstance(part, Picture)]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of a prompt, and for each picture the index of the first of its tokens."""

    ids: list[int]
    starts: list[int]


class ChatTemplate:
    """The chat template of one model. Thread-safe.

    Without a template (`source` None) a chat is what a base model can go on from: BOS where the model has one, then
    the texts of all messages with an empty line between, no role names.
    """

    def __init__(self, source: str | None, tokenizer: Tokenizer, *, image_token_id: int | None = None) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._template: jinja2.Template | None = None
        self._system_is_refused = self._wants_parts = False
        if source is not None:
            try:
                self._template = _environment().from_string(source)
                self._template.globals = dict(self._template.globals)  # a chain of two is walked entry by entry
            except jinja2.TemplateError as error:
                raise TokenizerError(f"the chat template has an error ({error}); mend it or remove it.") from error
            self._wants_parts = not self._shows("user", _PROBE) and self._shows("user", _parts(_PROBE))
            self._system_is_refused = not self._shows("system", _parts(_PROBE) if self._wants_parts else _PROBE)

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer, *, image_token_id: int | None = None) -> ChatTemplate:
        """From `chat_template.jinja`, else `chat_template.json`, else `tokenizer_config.json`. Raises
        `TokenizerError`. `image_token_id` is of models that see.
        """
        path = directory / "chat_template.jinja"
        if path.is_file():
            try:
                source = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise TokenizerError(f"{path} cannot be read as text ({error}); download the model again.") from error
            return cls(source, tokenizer, image_token_id=image_token_id)
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            found = read_json(directory / name).get("chat_template")
            if found:
                return cls(_default_template(found, directory / name), tokenizer, image_token_id=image_token_id)
        return cls(None, tokenizer, image_token_id=image_token_id)

    @property
    def exists(self) -> bool:
        """Whether the model has a template of its own."""
        return self._template is not None

    def encode(self, messages: Sequence[Message], *, limit: int | None = None) -> list[int]:
        """The ids of `encode_chat` alone."""
        return self.encode_chat(messages, limit=limit).ids

    def encode_chat(self, messages: Sequence[Message], *, limit: int | None = None) -> Encoded:
        """Ids of the prompt. A last assistant message is a prefill: the ids end within its turn, so that a reply
        continues it. A picture's token, which the template writes once, is there as often as the picture takes, as
        `transformers` has it (`Qwen3VLProcessor`).

        Raises `TemplateError` where the template refuses the messages, and `TooManyTokens` as `Tokenizer.encode` does.
        """
        pictures = [picture for message in messages for picture in message.pictures]
        if not pictures:
            return Encoded(self._encode(messages, limit), [])
        if self._template is None or self._image_token_id is None:
            raise TemplateError("this model has no place for images in its prompts; send text.")
        in_pictures = sum(picture.num_tokens for picture in pictures)
        if limit is not None and in_pictures > limit:
            raise TooManyTokens(in_pictures)
        return _expanded(self._encode(messages, limit), self._image_token_id, pictures)

    def _encode(self, messages: Sequence[Message], limit: int | None) -> list[int]:
        """With one token for each picture."""
        if self._template is None:
            text = _SEPARATOR.join(message.text for message in messages if message.text)
            return self._tokenizer.encode_text(text, limit=limit)
        if self._system_is_refused:
            messages = _fold_system(messages)
        return self._tokenizer.encode(self._render(messages), limit=limit)

    def _render(self, messages: Sequence[Message]) -> str:
        """The prompt, control tokens as aliases."""
        texts = "".join(message.text for message in messages)
        borders = sorted(self._tokenizer.border_characters)
        *stand_ins, mark = _unused_characters(len(borders) + 1, texts)

        def protected(text: str) -> str:
            return _replace(text, borders, stand_ins)

        # The blank tells whether the template trims: then the prefill is trimmed as well (as `transformers` does).
        prefill = messages[-1].role == "assistant"
        ends = [""] * (len(messages) - 1) + [mark + " " if prefill else ""]
        turns = [
            {"role": message.role, "content": self._content(message, protected, end)}
            for message, end in zip(messages, ends, strict=True)
        ]
        rendered = self._call(turns, add_generation_prompt=not prefill)
        if prefill:
            end = rendered.rfind(mark)
            if end < 0:
                raise TemplateError(
                    "this model's chat template does not take a last message of the assistant; end with a user message."
                )
            trims = not rendered.startswith(" ", end + 1)
            rendered = rendered[:end].replace(mark, "")
            if trims:
                rendered = rendered.rstrip()
        return _replace(self._tokenizer.alias(rendered), stand_ins, borders)

    def _call(self, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        assert self._template is not None
        try:
            return self._template.render(
                messages=turns,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,
                **self._tokenizer.special_tokens,
            )
        except _RefusedError as error:
            raise TemplateError(f"this model's chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program: any error in it is about these messages
            raise TemplateError(
                f"this model's chat template cannot render these messages ({type(error).__name__})."
            ) from error

    def _shows(self, role: str, content: str | list[dict[str, str]]) -> bool:
        """Whether the template has a place for a message: some raise, some drop it in silence."""
        turns = [{"role": role, "content": content}]
        if role != "user":
            turns.append({"role": "user", "content": _parts("hi") if self._wants_parts else "hi"})
        try:
            return _PROBE in self._call(turns, add_generation_prompt=True)
        except TemplateError:
            return False

    def _content(self, message: Message, protected: Callable[[str], str], end: str) -> str | list[dict[str, str]]:
        """As the template takes it, `end` behind it: a text, or a list of parts where there are pictures."""
        if message.pictures:
            return [
                {"type": "image"} if isinstance(part, Picture) else {"type": "text", "text": protected(part)}
                for part in message.content
            ]
        text = protected(message.text) + end
        return _parts(text) if self._wants_parts else text


def _default_template(found: Any, path: Path) -> str:
    """One template, or of several by name the one that is meant for a chat without tools and documents."""
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(map(str, found))
            raise TokenizerError(f"{path} has chat templates ({names}), but none whose name is default; name one so.")
        found = found["default"]
    if not isinstance(found, str):
        raise TokenizerError(f"{path}: chat_template is not a text, nor a list of them by name; mend it or remove it.")
    return found


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _expanded(ids: list[int], image_token_id: int, pictures: Sequence[Picture]) -> Encoded:
    places = [index for index, id_ in enumerate(ids) if id_ == image_token_id]
    if len(places) != len(pictures):
        raise TemplateError("this model's chat template does not take images where these messages have them.")
    expanded: list[int] = []
    starts: list[int] = []
    done = 0
    for place, picture in zip(places, pictures, strict=True):
        expanded += ids[done:place]
        starts.append(len(expanded))
        expanded += [image_token_id] * picture.num_tokens
        done = place + 1
    return Encoded(expanded + ids[done:], starts)


def _fold_system(messages: Sequence[Message]) -> list[Message]:
    """For templates without a place for it: the system text goes before the first user message's."""
    system = [message.text for message in messages if message.role == "system"]
    rest = [message for message in messages if message.role != "system"]
    if not system:
        return rest
    for index, message in enumerate(rest):
        if message.role == "user":
            before = _SEPARATOR.join(system) + _SEPARATOR
            content = before + message.content if isinstance(message.content, str) else (before, *message.content)
            rest[index] = Message("user", content)
            return rest
    raise TemplateError(
        "this model's chat template has no system role, and there is no user message to put the system text into."
    )


def _unused_characters(count: int, text: str) -> list[str]:
    """Distinct private-use characters that `text` does not contain: the first from a place drawn at random."""
    used = {character for character in text if ord(character) >= _PRIVATE.start} if not text.isascii() else set()
    start = secrets.randbelow(len(_PRIVATE))
    found: list[str] = []
    for place in range(len(_PRIVATE)):
        character = chr(_PRIVATE[(start + place) % len(_PRIVATE)])
        if character not in used:
            found.append(character)
            if len(found) == count:
                break
    return found


def _replace(text: str, characters: Sequence[str], by: Sequence[str]) -> str:
    """Each of `characters` by its counterpart; no counterpart is among `characters`.

    `str.translate` would look at every character, without letting other threads run: 0.2 s for 200 K tokens.
    """
    for old, new in zip(characters, by, strict=True):
        text = text.replace(old, new)
    return text


class _RefusedError(jinja2.TemplateError):
    """`raise_exception` of a template."""


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As `transformers` defines it for templates: no HTML escapes, unlike jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks the assistant's part for training; here it is only its
    content.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return str(caller())


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
