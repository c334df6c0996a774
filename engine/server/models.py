"""The models that this engine process serves: their facts, their text side and their state.

Owns loading tokenizers and templates. Weights are the core's; a model is ready when both are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aiexport_edge.engine.backends.base import Backend, ModelState, ModelStatus
from aiexport_edge.engine.models.facts import ModelFacts
from aiexport_edge.engine.text.template import ChatTemplate
from aiexport_edge.engine.text.tokenizer import Tokenizer, TokenizerError


@dataclass(frozen=True, slots=True)
class ModelText:
    """The text side of a model. `stop_ids` end its turn; `ascii_texts` is what its replies have found of its ids."""

    tokenizer: Tokenizer
    template: ChatTemplate
    stop_ids: frozenset[int]
    ascii_texts: dict[int, str] = field(default_factory=dict)


def load_text(facts: ModelFacts) -> ModelText:
    """Reads tokenizer and template. Raises `TokenizerError`."""
    tokenizer = Tokenizer.load(facts.directory)
    stop_ids = set(facts.stop_ids)
    if tokenizer.eos_id is not None:
        stop_ids.add(tokenizer.eos_id)
    image_token_id = None if facts.vision is None else facts.vision.image_token_id
    template = ChatTemplate.load(facts.directory, tokenizer, image_token_id=image_token_id)
    return ModelText(tokenizer, template, frozenset(stop_ids))


class Model:
    """One served model. `text` is None until it is loaded."""

    def __init__(self, index: int, facts: ModelFacts, backend: Backend) -> None:
        self.index = index
        self.facts = facts
        self.text: ModelText | None = None
        self._text_error = ""
        self._backend = backend

    def set_text(self, text: ModelText | TokenizerError) -> None:
        """The outcome of `load_text`."""
        if isinstance(text, TokenizerError):
            self._text_error = str(text)
        else:
            self.text = text

    @property
    def context_window(self) -> int:
        """Tokens, prompt and output together: what is really served."""
        capacity = self._backend.statuses()[self.index].capacity_tokens
        return min(self.facts.context_window, capacity or self.facts.context_window)

    @property
    def max_output_tokens(self) -> int:
        """The most that a reply may have."""
        return min(self.facts.max_output_tokens, self.context_window)

    @property
    def status(self) -> ModelStatus:
        """Ready when core and tokenizer are."""
        if self._text_error:
            return ModelStatus(ModelState.FAILED, self._text_error)
        status = self._backend.statuses()[self.index]
        if status.state is ModelState.READY and self.text is None:
            return ModelStatus(ModelState.LOADING)
        return status


def any_ready(models: Sequence[Model]) -> bool:
    """Whether this engine can serve anything."""
    return any(model.status.state is ModelState.READY for model in models)
