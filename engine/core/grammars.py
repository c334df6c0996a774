"""The constraints of this core's requests: what their grammars need is made in a thread, and remembered.

Owns the models' vocabularies, their compiled grammars and the requests that wait for one. A request waits off the step
loop: nothing of a grammar is made between two steps. Grammars come compiled; what is left to do here, for the grammar
library, it does without the interpreter. Knows no scheduler.
"""

from __future__ import annotations

import sys
import traceback
from collections import OrderedDict
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiexport_edge.engine.core.protocol import AddRequest, AddVocabulary, unpack_ids

if TYPE_CHECKING:  # imported by the thread that makes the first constraint: most starts see none
    from aiexport_edge.engine.structured.constraint import Constraint
    from aiexport_edge.engine.structured.endings import Endings
    from aiexport_edge.engine.structured.grammar import CompiledMasks, TokenMasks
    from aiexport_edge.engine.structured.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class _Kit:
    """What every document of one grammar in one vocabulary shares."""

    endings: Endings
    masks: CompiledMasks
    num_states: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with its constraint, None where it could not be made. `is_whole`: what an earlier attempt produced is a
    whole document.
    """

    message: AddRequest
    constraint: Constraint | None
    is_whole: bool


class Grammars:
    """Methods are for the loop's thread; `_make` and what it calls run in the other, and alone touch what is kept."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._words: dict[int, AddVocabulary] = {}
        self._vocabularies: dict[int, tuple[Vocabulary, TokenMasks]] = {}
        self._kits: OrderedDict[tuple[int, bytes, bytes], _Kit] = OrderedDict()
        self._num_states = 0  # of `_kits`
        self._waiting: dict[int, tuple[AddRequest, Future[tuple[Constraint, bool]]]] = {}

    def learn(self, words: AddVocabulary) -> None:
        """A model's vocabulary has come."""
        self._words[words.model] = words

    def submit(self, message: AddRequest) -> None:
        """Makes the constraint of a request; `ready` gives it back."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._waiting[message.handle] = (message, self._executor.submit(self._make, message))

    def withdraw(self, handle: int) -> bool:
        """The request has been ended; whether it was waiting here."""
        return self._waiting.pop(handle, None) is not None

    @property
    def busy(self) -> bool:
        """Whether a request waits."""
        return bool(self._waiting)

    def ready(self, *, at_most_s: float) -> list[Prepared]:
        """The requests whose constraints are there, in the order in which they came; waits for the first so long."""
        futures = [future for _, future in self._waiting.values()]
        if at_most_s:
            wait(futures, at_most_s, FIRST_COMPLETED)
        prepared = []
        for handle, (message, future) in list(self._waiting.items()):
            if not future.done():
                break  # one thread, in order
            del self._waiting[handle]
            error = future.exception()
            if error is None:
                prepared.append(Prepared(message, *future.result()))
            else:
                print(f"the grammar of the request with handle {handle}:", file=sys.stderr)
                traceback.print_exception(error)
                prepared.append(Prepared(message, None, is_whole=False))
        return prepared

    def _make(self, message: AddRequest) -> tuple[Constraint, bool]:
        from aiexport_edge.engine.structured.compile import MAX_KEPT, MAX_KEPT_STATES
        from aiexport_edge.engine.structured.constraint import Constraint

        assert message.grammar is not None
        name = (message.model, message.salt if message.grammar else b"", message.grammar)
        kit = self._kits.get(name)
        if kit is None:
            kit = self._kits[name] = self._make_kit(message, message.grammar)
            self._num_states += kit.num_states
            while len(self._kits) > 1 and (len(self._kits) > MAX_KEPT or self._num_states > MAX_KEPT_STATES):
                self._num_states -= self._kits.popitem(last=False)[1].num_states
        self._kits.move_to_end(name)
        constraint = Constraint(
            kit.endings, prefix=message.document_prefix, max_tokens=message.max_tokens, matcher=kit.masks.matcher()
        )
        return constraint, constraint.replay(unpack_ids(message.output_ids))

    def _make_kit(self, message: AddRequest, grammar: bytes) -> _Kit:
        from aiexport_edge.engine.structured.endings import Endings
        from aiexport_edge.engine.structured.grammar import TokenMasks
        from aiexport_edge.engine.structured.packed import unpack
        from aiexport_edge.engine.structured.vocabulary import Vocabulary

        known = self._vocabularies.get(message.model)
        if known is None:
            words = self._words[message.model]
            vocabulary = Vocabulary(words.tokens, words.stop_ids, len(words.tokens))
            known = self._vocabularies[message.model] = (vocabulary, TokenMasks(vocabulary))
        vocabulary, masks = known
        compiled = unpack(grammar)
        return _Kit(Endings(compiled.reader, vocabulary), masks.compile(compiled.lark), compiled.num_states)
