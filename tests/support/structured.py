"""For tests of structured output: the demo model's vocabulary, a public suite of schemas, documents drawn at random."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aiexport_edge.engine.structured.compile import compile_grammar
from aiexport_edge.engine.structured.constraint import Constraint
from aiexport_edge.engine.structured.endings import Endings
from aiexport_edge.engine.structured.grammar import CompiledMasks, TokenMasks
from aiexport_edge.engine.structured.vocabulary import Vocabulary
from aiexport_edge.engine.text.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo" / "model"
SUITE = Path(__file__).resolve().parents[1] / "engine" / "structured" / "json_schema_test_suite.json"
DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft6": "http://json-schema.org/draft-06/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
}
NUM_IDS, STOP_ID = 2048, 2


@functools.cache
def demo_vocabulary() -> Vocabulary:
    """Byte-level BPE: many tokens split characters."""
    tokenizer = Tokenizer.load(DEMO)
    tokens = [b"" if tokenizer.is_control(id_) else tokenizer.decode_bytes(id_) for id_ in range(NUM_IDS)]
    return Vocabulary(tokens, [STOP_ID], NUM_IDS)


@functools.cache
def demo_masks() -> TokenMasks:
    """The library's side of the vocabulary."""
    return TokenMasks(demo_vocabulary())


@dataclass(frozen=True)
class Kit:
    """A grammar for the demo vocabulary."""

    endings: Endings
    masks: CompiledMasks

    @staticmethod
    def of(grammar: bytes | Any) -> Kit:
        compiled = compile_grammar(grammar if isinstance(grammar, bytes) else json.dumps(grammar).encode())
        return Kit(Endings(compiled.reader, demo_vocabulary()), demo_masks().compile(compiled.lark))

    def constraint(self, max_tokens: int, prefix: bytes = b"", *, masked: bool = True) -> Constraint:
        matcher = self.masks.matcher() if masked else None
        return Constraint(self.endings, prefix=prefix, max_tokens=max_tokens, matcher=matcher)


def suite() -> Iterator[dict[str, Any]]:
    """The suite's schemas, each made one that an object can satisfy: as it is where references count its levels, else
    as that of a member. `tests` are pairs of an instance and whether it is valid; None where the schema is refused.
    """
    for entry in json.loads(SUITE.read_text(encoding="utf-8"))["schemas"]:
        schema, tests = entry["schema"], entry.get("tests")
        name = f"{entry['file']}: {entry['description']}"
        draft = DRAFTS.get(entry["file"].partition("/")[0], DRAFTS["draft7"])
        if "$ref" in json.dumps(schema) or not isinstance(schema, dict):
            if isinstance(schema, dict):
                schema = {**schema, "$schema": schema.get("$schema", draft)}
            yield {"name": name, "schema": schema, "tests": tests}
            continue
        bare = {key: value for key, value in schema.items() if key not in ("$id", "id", "$schema")}
        held = {"type": "object", "properties": {"value": bare}, "required": ["value"]}
        held_tests = None if tests is None else [[{"value": data}, valid] for data, valid in tests]
        yield {"name": name, "schema": {**held, "$schema": schema.get("$schema", draft)}, "tests": held_tests}


def allowed(constraint: Constraint) -> list[int]:
    """The ids that may come next."""
    row = np.zeros(NUM_IDS // 32, dtype=np.int32)
    constraint.fill(row)
    return [int(id_) for id_ in np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))]


def drawn_by(rng: random.Random) -> Callable[[Constraint], int]:
    """An id among those allowed, short ones often: structure rather than words."""

    def draw(constraint: Constraint) -> int:
        ids = allowed(constraint)
        short = [id_ for id_ in ids if len(demo_vocabulary().bytes_of(id_)) <= 2]
        return rng.choice(short if short and rng.random() < 0.5 else ids)

    return draw


def write(constraint: Constraint, draw: Callable[[Constraint], int]) -> tuple[list[int], bool]:
    """Draws until the document is over: its ids, and whether it was cut."""
    ids: list[int] = []
    while True:
        step = constraint.advance([draw(constraint)])
        ids += step.ids
        if step.over:
            return ids, step.cut


def text_of(ids: list[int]) -> str:
    """Strictly decoded: half a character is an error."""
    return b"".join(map(demo_vocabulary().bytes_of, ids)).decode("utf-8")
