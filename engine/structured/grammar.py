"""Token masks from the grammar library, behind one narrow interface. The library is llguidance.

Owns the library's objects and limits. A matcher that runs out of its limits, or that disagrees with what was drawn, is
spent: it says so and masks nothing more; what becomes of the document then is the constraint's affair, which does not
depend on the library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiexport_edge.engine.structured.vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from llguidance import LLMatcher

# What one mask may cost at most, about 4 ms each for the lexer and the parser; and what a grammar may, about 20 ms.
STEP_LEXER_FUEL = 50_000
STEP_MAX_ITEMS = 50_000
INITIAL_LEXER_FUEL = 1_000_000
MAX_LEXER_STATES = 50_000  # 1-2 kB each


class Matcher:
    """One document, token by token."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def spent(self) -> bool:
        """Whether it can say nothing more."""
        return bool(self._matcher.is_error())

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Set bit t % 32 of word t // 32 where token t may come next, stop ids where the document may end; clear the
        others. The row is contiguous, ceil(vocabulary / 32) words."""
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def consume(self, ids: list[int]) -> bool:
        """Goes on by these tokens; whether they fit."""
        return bool(self._matcher.consume_tokens(ids))

    def copy(self) -> Matcher:
        """Another that is where this one is. It costs a microsecond."""
        return Matcher(self._matcher.deep_copy())

    def forced(self) -> list[int]:
        """The tokens that must come next; empty where there is a choice."""
        return [] if self.spent else list(self._matcher.compute_ff_tokens())


class TokenMasks:
    """A model's vocabulary as the library wants it. Making one takes a moment: off the step loop."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        spelling = _Spelling(vocabulary)
        ends = sorted(vocabulary.stop_ids) or [spelling.eos_token_id]
        self._tokenizer = LLTokenizer(TokenizerWrapper(spelling), n_vocab=vocabulary.size, eos_token=ends)
        self._limits = LLParserLimits(
            initial_lexer_fuel=INITIAL_LEXER_FUEL,
            step_lexer_fuel=STEP_LEXER_FUEL,
            step_max_items=STEP_MAX_ITEMS,
            max_lexer_states=MAX_LEXER_STATES,
            verbose_errors=False,
        )

    def compile(self, grammar: str) -> CompiledMasks:
        """Of a grammar in the library's Lark (`lark.py`). Drops the GIL. A grammar that is too large gives matchers
        that are spent."""
        from llguidance import LLMatcher

        return CompiledMasks(
            LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=self._limits)
        )


class CompiledMasks:
    """A grammar for one vocabulary."""

    def __init__(self, first: LLMatcher) -> None:
        self._first = first

    def matcher(self) -> Matcher:
        """For a new document."""
        return Matcher(self._first.deep_copy())


class _Spelling:
    """What `LLTokenizer` asks for. Tokens that are not text begin with 0xff, which is in no UTF-8 text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.bos_token_id = None
        tokens = [*vocabulary.tokens, *[b""] * (vocabulary.size - len(vocabulary.tokens))]
        if vocabulary.stop_ids:
            self.eos_token_id = min(vocabulary.stop_ids)
        else:  # the library wants an end: a document's last byte ends it, so none is ever drawn
            lengths = [len(token) for token in tokens]
            self.eos_token_id = lengths.index(0) if 0 in lengths else lengths.index(max(lengths))
            tokens[self.eos_token_id] = b""
        self.tokens = [token or b"\xff<%d>" % id_ for id_, token in enumerate(tokens)]
        self.special_token_ids = [id_ for id_, token in enumerate(self.tokens) if token.startswith(b"\xff<")]

    def __call__(self, text: Any) -> list[int]:
        return self._vocabulary.encode(text if isinstance(text, bytes) else text.encode()) or []


def check_library(grammar: str) -> bool:
    """Whether the library takes a grammar within its limits, whatever the vocabulary. Drops the GIL."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(initial_lexer_fuel=INITIAL_LEXER_FUEL, max_lexer_states=MAX_LEXER_STATES)
    failed, _ = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_lark(grammar), limits=limits)
    return not failed
