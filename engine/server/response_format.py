"""`response_format` of a request: its grammar, and whether a document of it fits the request.

Owns the engine's compiled grammars and the vocabularies that they are measured in. Everything here refuses before a
token is generated; what then keeps the promise is the core's (`engine/structured/constraint.py`).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass

from aiexport_edge.engine.backends.base import BackendConstraint
from aiexport_edge.engine.server.errors import InvalidRequest, RequestError
from aiexport_edge.engine.server.models import Model, ModelText
from aiexport_edge.engine.server.prompt import BLOCK_SEPARATOR
from aiexport_edge.engine.structured.compile import ANY_OBJECT, Compiled
from aiexport_edge.engine.structured.compiler import Busy, GrammarCache, Unavailable
from aiexport_edge.engine.structured.constraint import Constraint, NoRoom, NotABeginning, NotSpellable
from aiexport_edge.engine.structured.endings import Endings
from aiexport_edge.engine.structured.prefix import document_prefix
from aiexport_edge.engine.structured.resolve import UnsupportedSchema
from aiexport_edge.engine.structured.vocabulary import Vocabulary
from aiexport_edge.proto import engine_pb2 as pb

_SCHEMA_FIELD = "response_format.json_schema"
_RETRY_MS = 1000


def is_constrained(request: pb.GenerateRequest) -> bool:
    """Whether the reply is to be a document."""
    return request.response_format.WhichOneof("format") is not None


@dataclass(frozen=True, slots=True)
class Format:
    """A request's grammar: `endings` for this process, `packed` for the core."""

    endings: Endings
    packed: bytes


class ResponseFormats:
    """For all models of this process. Methods are for the event loop."""

    def __init__(self) -> None:
        self._cache = GrammarCache()
        self._vocabularies: dict[int, Future[Vocabulary]] = {}

    def ready(self, request: pb.GenerateRequest, model: Model) -> Format | None:
        """Where nothing has to be compiled any more."""
        compiled = self._cache.get(request.tenant.cache_salt, _grammar(request))
        vocabulary = self._vocabularies.get(model.index)
        if compiled is None or vocabulary is None or not vocabulary.done():
            return None
        return Format(Endings(compiled.reader, vocabulary.result()), compiled.packed)

    async def prepare(self, request: pb.GenerateRequest, model: Model, text: ModelText) -> Format:
        """Compiles what has to be. Raises `RequestError`."""
        vocabulary = self._vocabularies.get(model.index)
        if vocabulary is None:
            vocabulary = self._cache.run(lambda: _vocabulary(model, text))
            self._vocabularies[model.index] = vocabulary
        compiled = await self._compiled(request.tenant.cache_salt, _grammar(request))
        return Format(Endings(compiled.reader, await asyncio.wrap_future(vocabulary)), compiled.packed)

    def close(self) -> None:
        """Frees what compiles."""
        self._cache.close()

    async def _compiled(self, salt: bytes, grammar: bytes) -> Compiled:
        found = self._cache.get(salt, grammar)
        if found is not None:
            return found
        try:
            return await asyncio.shield(asyncio.wrap_future(self._cache.submit(salt, grammar)))
        except UnsupportedSchema as error:
            raise InvalidRequest(f"This JSON Schema cannot be promised: {error}.", _SCHEMA_FIELD) from error
        except Busy as error:
            raise RequestError(
                pb.ERROR_QUEUE_FULL, "Too many schemas are being read; try again soon.", retry_after_ms=_RETRY_MS
            ) from error
        except Unavailable as error:
            raise RequestError(
                pb.ERROR_QUEUE_FULL, "Schemas cannot be read just now; try again soon.", retry_after_ms=_RETRY_MS
            ) from error


def constraint_of(request: pb.GenerateRequest, format_: Format, max_tokens: int) -> tuple[BackendConstraint, bool]:
    """What the backend is given, and whether the ids to be resumed with make a whole document already. Raises
    `InvalidRequest` where no document can come of this request.
    """
    prefix = b""
    if request.WhichOneof("prompt") == "chat" and request.chat.messages[-1].role == pb.ROLE_ASSISTANT:
        prefix = document_prefix(BLOCK_SEPARATOR.join(block.text for block in request.chat.messages[-1].content))
    try:
        constraint = Constraint(format_.endings, prefix=prefix, max_tokens=max_tokens)
        is_whole = constraint.replay(request.resume.forced_ids)
    except NotABeginning as error:
        raise InvalidRequest(
            "The last assistant message is a whole document already; leave it out or ask without response_format."
            if error.is_whole
            else "The last assistant message must be the beginning of a document of this response_format.",
            "chat.messages",
        ) from error
    except NotSpellable as error:
        raise InvalidRequest("This model has no tokens for such a document.", "response_format") from error
    except NoRoom as error:
        raise InvalidRequest(
            f"The reply may have {max_tokens} tokens, but the shortest document of this response_format takes "
            f"{error.num_tokens}; raise max_tokens.",
            "max_tokens",
            limit=max_tokens,
            actual=error.num_tokens,
        ) from error
    return BackendConstraint(format_.packed, prefix, format_.endings.vocabulary), is_whole


def _grammar(request: pb.GenerateRequest) -> bytes:
    """The name by which `GrammarCache` knows it."""
    if request.response_format.WhichOneof("format") == "json_object":
        return ANY_OBJECT
    return request.response_format.json_schema.encode() or b"null"


def _vocabulary(model: Model, text: ModelText) -> Vocabulary:
    tokenizer, size = text.tokenizer, model.facts.vocab_size
    tokens = [b"" if tokenizer.is_control(id_) else tokenizer.decode_bytes(id_) for id_ in range(size)]
    return Vocabulary(tokens, sorted(text.stop_ids), size)
