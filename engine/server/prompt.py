"""From a GenerateRequest to what the backend is given: validation, tokens, budget.

Pure functions of a request and a model; each refusal is a `RequestError` that names the field. Knows no queue and no
session.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from aiexport_edge.engine.backends.base import ModelState
from aiexport_edge.engine.core.protocol import Priority
from aiexport_edge.engine.server.errors import InvalidRequest, RequestError
from aiexport_edge.engine.server.models import Model, ModelText
from aiexport_edge.engine.text.template import Encoded, Message, Picture, TemplateError
from aiexport_edge.engine.text.tokenizer import TooManyTokens
from aiexport_edge.proto import engine_pb2 as pb

DEFAULT_MAX_TOKENS = 1024
MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARACTERS = 256
INLINE_CHARACTERS = 2000  # shorter prompts are tokenized on the event loop: under a millisecond
BLOCK_SEPARATOR = "\n"  # between the text blocks of one message

_ROLES: dict[int, Literal["system", "user", "assistant"]] = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
}
_PRIORITIES = {
    pb.PRIORITY_UNSPECIFIED: Priority.INTERACTIVE,
    pb.PRIORITY_INTERACTIVE: Priority.INTERACTIVE,
    pb.PRIORITY_BATCH: Priority.BATCH,
}


def check_model(models: dict[str, Model], name: str) -> tuple[Model, ModelText]:
    """The model and its text side. Raises `RequestError` where it does not exist or cannot serve now."""
    model = models.get(name)
    if model is None:
        known = ", ".join(sorted(models))
        raise RequestError(pb.ERROR_NOT_FOUND, f"There is no model {name!r} here; there is {known}.", field="model")
    status = model.status
    if status.state is ModelState.FAILED:
        raise RequestError(
            pb.ERROR_QUEUE_FULL,
            f"The model {name} could not be loaded; its operator finds the reason in the engine's log.",
        )
    if status.state is ModelState.LOADING or model.text is None:
        raise RequestError(
            pb.ERROR_QUEUE_FULL, f"The model {name} is still loading; try again soon.", retry_after_ms=1000
        )
    return model, model.text


def check_sampling(sampling: pb.SamplingParams) -> None:
    """Raises `InvalidRequest` for a value out of range."""
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise InvalidRequest("temperature must be a number of 0 or more.", "sampling.temperature")
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise InvalidRequest("top_p must be above 0 and at most 1.", "sampling.top_p")
    if sampling.HasField("top_k") and not 0 < sampling.top_k < 1 << 31:
        raise InvalidRequest("top_k must be at least 1 and below 2^31.", "sampling.top_k")
    if len(sampling.stop_sequences) > MAX_STOP_SEQUENCES:
        raise InvalidRequest(
            f"At most {MAX_STOP_SEQUENCES} stop sequences are taken.",
            "sampling.stop_sequences",
            limit=MAX_STOP_SEQUENCES,
            actual=len(sampling.stop_sequences),
        )
    for index, stop in enumerate(sampling.stop_sequences):
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"A stop sequence has 1 to {MAX_STOP_CHARACTERS} characters.",
                f"sampling.stop_sequences.{index}",
                limit=MAX_STOP_CHARACTERS,
                actual=len(stop),
            )


def check_request(request: pb.GenerateRequest, model: Model) -> None:
    """Everything that can be said without tokenizing. Raises `RequestError`."""
    check_sampling(request.sampling)
    if request.priority not in _PRIORITIES:
        raise InvalidRequest("priority must be INTERACTIVE or BATCH.", "priority")
    if not (math.isfinite(request.tenant.weight) and request.tenant.weight >= 0):
        raise InvalidRequest("tenant.weight must be a number of 0 or more.", "tenant.weight")
    limit = model.max_output_tokens
    if request.HasField("max_tokens"):
        if request.max_tokens < 1:
            raise InvalidRequest("max_tokens must be at least 1.", "max_tokens")
        if request.max_tokens > limit:
            raise InvalidRequest(
                f"max_tokens is {request.max_tokens}, but {model.facts.name} writes at most {limit} tokens.",
                "max_tokens",
                limit=limit,
                actual=request.max_tokens,
            )
    if request.HasField("resume"):
        _check_resume(request, model)


def _check_resume(request: pb.GenerateRequest, model: Model) -> None:
    resume = request.resume
    if resume.model_revision != model.facts.revision:
        raise RequestError(
            pb.ERROR_REVISION_CHANGED,
            f"The model {model.facts.name} has changed since this reply began, so the reply cannot go on.",
            field="resume.model_revision",
        )
    if resume.max_tokens < 1:
        raise InvalidRequest("resume.max_tokens must be the budget that Accepted said.", "resume.max_tokens")
    if resume.forced_ids and max(resume.forced_ids) >= model.facts.vocab_size:
        raise InvalidRequest("resume.forced_ids has an id that this model does not have.", "resume.forced_ids")
    if len(resume.forced_ids) > resume.max_tokens:
        raise InvalidRequest(
            "resume.forced_ids are more than resume.max_tokens.",
            "resume.forced_ids",
            limit=resume.max_tokens,
            actual=len(resume.forced_ids),
        )
    if not request.sampling.HasField("seed") and request.sampling.temperature > 0:
        raise InvalidRequest("A resumed request carries the seed that Accepted said.", "sampling.seed")


def num_characters(request: pb.GenerateRequest | pb.CountTokensRequest) -> int:
    """How much there is to read or to tokenize; decides whether that is done on the event loop."""
    match request.WhichOneof("prompt"):
        case "chat":
            return sum(len(block.text) for message in request.chat.messages for block in message.content)
        case "text":
            return len(request.text)
        case "token_ids" if isinstance(request, pb.GenerateRequest):
            return len(request.token_ids.ids)
        case _:
            return 0


def encode_prompt(
    request: pb.GenerateRequest | pb.CountTokensRequest,
    model: Model,
    text: ModelText,
    pictures: Sequence[Picture] = (),
) -> Encoded:
    """The prompt; `pictures` stand for the image blocks in their order. Raises `RequestError`. Thread-safe."""
    limit = model.context_window
    try:
        match request.WhichOneof("prompt"):
            case "chat":
                prompt = text.template.encode_chat(_messages(request.chat, pictures), limit=limit)
            case "text":
                prompt = Encoded(text.tokenizer.encode_text(request.text, limit=limit), [])
            case "token_ids" if isinstance(request, pb.GenerateRequest):
                prompt = Encoded(list(request.token_ids.ids), [])
            case _:
                raise InvalidRequest("One of chat, token_ids and text must be given.", "prompt")
    except TemplateError as error:
        raise InvalidRequest(str(error), "chat.messages") from error
    except TooManyTokens as error:
        raise too_long(model, error.at_least, f"at least {error.at_least}") from error
    ids = prompt.ids
    if not ids:
        raise InvalidRequest("The prompt is empty; send at least one token.", request.WhichOneof("prompt") or "prompt")
    if max(ids) >= model.facts.vocab_size:
        raise InvalidRequest(
            f"The prompt has the token id {max(ids)}; {model.facts.name} has ids below {model.facts.vocab_size}.",
            request.WhichOneof("prompt") or "prompt",
            limit=model.facts.vocab_size - 1,
            actual=max(ids),
        )
    return prompt


def continues_text(request: pb.GenerateRequest, text: ModelText, prompt_ids: list[int]) -> bool:
    """Whether the reply goes on within a text, so that a space at its beginning counts, rather than beginning anew."""
    if text.tokenizer.is_control(prompt_ids[-1]):
        return False
    if request.WhichOneof("prompt") == "chat" and text.template.exists:
        return request.chat.messages[-1].role == pb.ROLE_ASSISTANT
    return True


def budget(request: pb.GenerateRequest, model: Model, num_prompt_tokens: int) -> int:
    """The resolved max_tokens. Raises `RequestError` where the prompt does not fit, or is not the one to be resumed."""
    window = model.context_window
    room = window - num_prompt_tokens
    if room < 1:
        raise too_long(model, num_prompt_tokens, str(num_prompt_tokens))
    if not request.HasField("resume"):
        if request.HasField("max_tokens"):
            return min(request.max_tokens, room)
        return min(DEFAULT_MAX_TOKENS, model.max_output_tokens, room)
    if request.resume.prompt_tokens != num_prompt_tokens:
        raise RequestError(
            pb.ERROR_REVISION_CHANGED,
            f"The prompt has {num_prompt_tokens} tokens now and had {request.resume.prompt_tokens} when this reply "
            "began, so the reply cannot go on.",
            field="resume.prompt_tokens",
            limit=request.resume.prompt_tokens,
            actual=num_prompt_tokens,
        )
    if request.resume.max_tokens > room:
        raise RequestError(
            pb.ERROR_REVISION_CHANGED,
            f"The context window of {model.facts.name} has become smaller since this reply began, "
            "so the reply cannot go on.",
            field="resume.max_tokens",
            limit=room,
            actual=request.resume.max_tokens,
        )
    return request.resume.max_tokens


def too_long(model: Model, num_tokens: int, in_words: str) -> RequestError:
    """The error of a prompt that does not fit."""
    window = model.context_window
    return RequestError(
        pb.ERROR_CONTEXT_LENGTH,
        f"The prompt has {in_words} tokens, but the context window of {model.facts.name} has {window}, "
        "of which the reply needs at least one; shorten the prompt.",
        field="prompt",
        limit=window,
        actual=num_tokens,
    )


def priority_of(request: pb.GenerateRequest) -> Priority:
    """Its class of service."""
    return _PRIORITIES[request.priority]


def _messages(chat: pb.Chat, pictures: Sequence[Picture]) -> list[Message]:
    if not chat.messages:
        raise InvalidRequest("A chat has at least one message.", "chat.messages")
    messages = []
    left = iter(pictures)
    for index, message in enumerate(chat.messages):
        role = _ROLES.get(message.role)
        if role is None:
            raise InvalidRequest("role must be SYSTEM, USER or ASSISTANT.", f"chat.messages.{index}.role")
        parts: list[str | Picture] = []
        for place, block in enumerate(message.content):
            match block.WhichOneof("block"):
                case "image":
                    parts.append(next(left))
                case "text" if parts and isinstance(parts[-1], str):
                    parts[-1] += BLOCK_SEPARATOR + block.text
                case "text":
                    parts.append(block.text)
                case _:
                    field = f"chat.messages.{index}.content.{place}"
                    raise InvalidRequest("A content block must hold something.", field)
        match parts:
            case []:
                messages.append(Message(role, ""))
            case [str(only)]:
                messages.append(Message(role, only))
            case _:
                messages.append(Message(role, tuple(parts)))
    return messages
