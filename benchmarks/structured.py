"""Grammar libraries side by side: llguidance and xgrammar on a public suite of schemas; and what JSON mode costs here.

    pip install xgrammar
    python -m benchmarks.structured [--write benchmarks/results/structured.json]

For each library, over the schemas of JSON-Schema-Test-Suite (drafts 4 to 2020-12, each once): how many it compiles and
how long that takes, whether the suite's valid instances are in the grammar and its invalid ones are not (`jsonschema`
is the judge), and the time of a token's mask along the instances, for the demo model's 2,048 tokens and for 151,936.
A third row is what the product uses: its own grammars of its own subset, masked by llguidance. Then the cost of a
constrained row: the mask, and everything that its document's state takes (`Constraint.advance`). CPU time.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import jsonschema
import numpy as np

from aiexport_edge.engine.structured.compile import ANY_OBJECT, compile_grammar
from aiexport_edge.engine.structured.constraint import Constraint
from aiexport_edge.engine.structured.endings import Endings
from aiexport_edge.engine.structured.grammar import TokenMasks, _Spelling
from aiexport_edge.engine.structured.resolve import UnsupportedSchema
from aiexport_edge.engine.structured.vocabulary import Vocabulary
from aiexport_edge.engine.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "tests" / "engine" / "structured" / "json_schema_test_suite.json"
LARGE = 151_936
STOP_ID = 2


def demo_vocabulary() -> Vocabulary:
    tokenizer = Tokenizer.load(ROOT / "engine" / "demo" / "model")
    tokens = [b"" if tokenizer.is_control(id_) else tokenizer.decode_bytes(id_) for id_ in range(2048)]
    return Vocabulary(tokens, [STOP_ID], 2048)


def large_vocabulary() -> Vocabulary:
    """The demo model's tokens, and pronounceable words with and without a blank before them, up to a large model's."""
    rng = random.Random(1)
    tokens = dict.fromkeys(demo_vocabulary().tokens)
    while len(tokens) < LARGE:
        word = "".join(rng.choice("bcdfghklmnprstvw") + rng.choice("aeiou") for _ in range(rng.randint(1, 5)))
        tokens[(rng.choice(["", " ", " ", '"', "-"]) + rng.choice([word, word.capitalize(), word + "s"])).encode()] = (
            None
        )
    words = list(tokens)
    return Vocabulary([words[0], b"<start>", b"", *words[1 : LARGE - 2]], [STOP_ID], LARGE)


class Grammar(Protocol):
    """A compiled grammar, walked from its beginning each time."""

    def begin(self) -> None: ...

    def fill(self, row: Any) -> None: ...

    def take(self, id_: int) -> bool: ...

    def may_end(self) -> bool: ...


class LLGuidance:
    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        spelling = TokenizerWrapper(_Spelling(vocabulary))
        self._tokenizer = LLTokenizer(spelling, n_vocab=vocabulary.size, eos_token=[STOP_ID])

    def compile(self, schema: Any) -> Grammar | None:
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        return _matched(LLMatcher(self._tokenizer, grammar, log_level=0))


class Ours:
    name = "own grammars, llguidance's masks"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._masks = TokenMasks(vocabulary)

    def compile(self, schema: Any) -> Grammar | None:
        try:
            return _matched(self._masks.compile(compile_grammar(json.dumps(schema).encode()).lark)._first)
        except UnsupportedSchema:
            return None


def _matched(first: Any) -> Grammar | None:
    class Walk:
        matcher = first

        def begin(self) -> None:
            self.matcher = first.deep_copy()

        def fill(self, row: Any) -> None:
            self.matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

        def take(self, id_: int) -> bool:
            return bool(self.matcher.try_consume_tokens([id_]))

        def may_end(self) -> bool:
            return bool(self.matcher.is_accepting())

    return None if first.is_error() else Walk()


class XGrammar:
    name = "xgrammar"

    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        self._library = xgrammar
        info = xgrammar.TokenizerInfo(
            _Spelling(vocabulary).tokens,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=vocabulary.size,
            stop_token_ids=[STOP_ID],
        )
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._size = vocabulary.size

    def compile(self, schema: Any) -> Grammar | None:
        import torch

        try:
            compiled = self._compiler.compile_json_schema(json.dumps(schema), strict_mode=False)
        except Exception:  # of its own kinds, and of C++'s
            return None
        library, size = self._library, self._size

        class Walk:
            matcher: Any = None

            def begin(self) -> None:
                self.matcher = library.GrammarMatcher(compiled)

            def fill(self, row: Any) -> None:
                self.matcher.fill_next_token_bitmask(torch.from_numpy(row).view(1, -1))

            def take(self, id_: int) -> bool:
                return bool(self.matcher.accept_token(id_))

            def may_end(self) -> bool:
                bitmask = library.allocate_token_bitmask(1, size)
                self.matcher.fill_next_token_bitmask(bitmask)
                return bool(int(bitmask[0, STOP_ID // 32]) >> (STOP_ID % 32) & 1)

        return Walk()


def spellings(instance: Any) -> Iterator[bytes]:
    for separators in ((",", ":"), (", ", ": ")):
        yield json.dumps(instance, ensure_ascii=False, separators=separators).encode()


def accepts(grammar: Grammar, vocabulary: Vocabulary, text: bytes) -> bool:
    ids = vocabulary.encode(text)
    assert ids is not None
    grammar.begin()
    return all(grammar.take(id_) for id_ in ids) and grammar.may_end()


def measure(library: Any, entries: list[dict[str, Any]], vocabulary: Vocabulary) -> dict[str, Any]:
    compile_ms: list[float] = []
    mask_us: list[float] = []
    counts = dict.fromkeys(
        ("schemas", "compiled", "valid", "valid_accepted", "invalid", "invalid_accepted", "unsound"), 0
    )
    row = np.zeros(-(-vocabulary.size // 32), dtype=np.int32)
    for entry in entries:
        counts["schemas"] += 1
        start = time.process_time()
        grammar = library.compile(entry["schema"])
        if grammar is None:
            continue
        counts["compiled"] += 1
        compile_ms.append(1e3 * (time.process_time() - start))
        unsound = False
        for instance, valid in entry["tests"]:
            accepted = any(accepts(grammar, vocabulary, text) for text in spellings(instance))
            counts["valid" if valid else "invalid"] += 1
            counts["valid_accepted" if valid else "invalid_accepted"] += accepted
            unsound = unsound or (accepted and not valid)
            if accepted:
                mask_us += mask_times(grammar, vocabulary, next(spellings(instance)), row)
        counts["unsound"] += unsound
    return {
        **counts,
        "compile_ms_median": round(statistics.median(compile_ms), 3),
        "compile_ms_p99": round(sorted(compile_ms)[int(0.99 * len(compile_ms))], 3),
        "mask_us_median": round(statistics.median(mask_us), 1),
        "mask_us_p99": round(sorted(mask_us)[int(0.99 * len(mask_us))], 1),
    }


def mask_times(grammar: Grammar, vocabulary: Vocabulary, text: bytes, row: Any) -> list[float]:
    """Microseconds of each token's mask along a text."""
    times: list[float] = []
    grammar.begin()
    for id_ in vocabulary.encode(text) or ():
        start = time.thread_time()
        grammar.fill(row)
        times.append(1e6 * (time.thread_time() - start))
        if not grammar.take(id_):
            break
    return times


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}},
        "friends": {"type": "array", "items": {"$ref": "#"}},
    },
    "required": ["name", "age"],
}
TEXT = '{"name": "Ada Lovelace, who wrote the first program", "age": 36, "tags": ["red", "blue"], "friends": []}'


def cost_of_a_row(vocabulary: Vocabulary, grammar: bytes) -> dict[str, float]:
    """Microseconds a token along a document of a hundred characters, with room to spare and at the budget's end."""
    compiled = compile_grammar(grammar)
    endings, masks = Endings(compiled.reader, vocabulary), TokenMasks(vocabulary).compile(compiled.lark)
    ids = vocabulary.encode(TEXT.encode()) or []
    row = np.zeros(-(-vocabulary.size // 32), dtype=np.int32)

    def run(room: int) -> tuple[float, float]:
        fill_us: list[float] = []
        advance_us: list[float] = []
        for _ in range(100):
            constraint = Constraint(endings, prefix=b"", max_tokens=len(ids) + room, matcher=masks.matcher())
            for id_ in ids:
                start = time.thread_time()
                constraint.fill(row)
                middle = time.thread_time()
                step = constraint.advance([id_])
                fill_us.append(1e6 * (middle - start))
                advance_us.append(1e6 * (time.thread_time() - middle))
                if step.over:
                    break
        return statistics.mean(fill_us), statistics.mean(advance_us)

    fill, advance = run(1000)
    _, near = run(0)
    return {"mask_us": round(fill, 1), "advance_us": round(advance, 1), "advance_us_near_the_end": round(near, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a file for the results, as JSON")
    arguments = parser.parse_args()
    entries = [e for e in json.loads(SUITE.read_text(encoding="utf-8"))["schemas"] if isinstance(e["schema"], dict)]
    for entry in entries:
        _hold(entry)
    results: dict[str, Any] = {
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("llguidance", "xgrammar", "jsonschema")},
        "libraries": {},
        "a_row": {},
    }
    for name, make in (("2,048 tokens", demo_vocabulary), ("151,936 tokens", large_vocabulary)):
        vocabulary = make()
        for library in (LLGuidance, XGrammar, Ours):
            start = time.process_time()
            made = library(vocabulary)
            setup_ms = 1e3 * (time.process_time() - start)
            figures = {"setup_ms": round(setup_ms, 1), **measure(made, entries, vocabulary)}
            results["libraries"][f"{library.name}, {name}"] = figures
            print(f"{library.name}, {name}: {json.dumps(figures)}", flush=True)
        for what, grammar in (("json_object", ANY_OBJECT), ("json_schema", json.dumps(PERSON).encode())):
            figures_of_row = cost_of_a_row(vocabulary, grammar)
            results["a_row"][f"{what}, {name}"] = figures_of_row
            print(f"a row, {what}, {name}: {json.dumps(figures_of_row)}", flush=True)
    if arguments.write:
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        arguments.write.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def _hold(entry: dict[str, Any]) -> None:
    """Makes of an entry of the suite one about objects: its schema is that of a member, unless references count levels.
    The verdicts are `jsonschema`'s."""
    schema, tests = entry["schema"], entry.get("tests", [])
    draft = _DRAFTS.get(entry["file"].partition("/")[0])
    if "$ref" not in json.dumps(schema):
        bare = {key: value for key, value in schema.items() if key not in ("$id", "id", "$schema")}
        draft = schema.get("$schema", draft)
        schema = {"type": "object", "properties": {"value": bare}, "required": ["value"]}
        tests = [[{"value": data}, valid] for data, valid in tests]
    if draft is not None:
        schema = {**schema, "$schema": schema.get("$schema", draft)}
    validator = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)(schema)
    entry["schema"] = schema
    entry["tests"] = [[data, validator.is_valid(data)] for data, _ in tests if isinstance(data, dict)]


_DRAFTS = {f"draft{number}": f"http://json-schema.org/draft-0{number}/schema#" for number in (4, 6, 7)}


if __name__ == "__main__":
    sys.exit(main())
