"""The schemas of the benchmark: each is taken or refused in words, and no two of a kind are the same."""

from __future__ import annotations

import json

import pytest

from aiexport_edge.engine.structured.compile import compile_grammar
from aiexport_edge.engine.structured.resolve import UnsupportedSchema
from benchmarks.hostile_schemas import KINDS, Kind, ordinary, rows_of

REFUSED = {
    *("90 levels deep", "an enum of 3,000", "1,000 optional members", "counts of any character"),
    *("powers of repetition", "recursion, 24 definitions", "anyOf twice, 50 deep", "allOf twice, 50 deep"),
    *("40 options alike", "arrays of 2,000 in arrays", "bounds of numbers", "64 KiB and more"),
}


@pytest.mark.parametrize("kind", ["ordinary", *KINDS])
def test_each_is_taken_or_refused(kind: str) -> None:
    first, second = ((KINDS.get(kind, ordinary))(number) for number in (1, 2))
    assert first != second
    schema = json.dumps(first).encode()
    if kind in REFUSED:
        with pytest.raises(UnsupportedSchema):
            compile_grammar(schema)
    else:
        assert compile_grammar(schema).num_states


def test_rows_compare_with_the_ordinary_schema() -> None:
    gaps = {"an ordinary schema": [[0.001] * 98 + [0.01, 0.02]], "hostile": [[0.001] * 98 + [0.03, 0.04]]}
    found = {name: Kind(gaps=rounds, answers={"refusal": None}) for name, rounds in gaps.items()}
    found["hostile"].statuses[400] = 3
    row = rows_of(found)[1]
    assert (row["gap_p50_ms"], row["gap_p99_ms"], row["p99_to_ordinary"]) == (1.0, 40.0, 2.0)
    assert row["statuses"] == {"400": 3}
