"""The guarantee: whatever is drawn, the reply is a whole document within its budget, and no longer than it must be."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.structured import NUM_IDS, STOP_ID, Kit, allowed, demo_vocabulary, drawn_by, text_of, write

from aiexport_edge.engine.structured.compile import ANY_OBJECT, compile_grammar
from aiexport_edge.engine.structured.constraint import Constraint, NoRoom, NotABeginning, NotSpellable
from aiexport_edge.engine.structured.document import MAX_DEPTH
from aiexport_edge.engine.structured.endings import Endings
from aiexport_edge.engine.structured.grammar import TokenMasks
from aiexport_edge.engine.structured.vocabulary import Vocabulary

ANY = Kit.of(ANY_OBJECT)
PERSON = Kit.of(
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 3, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}, "minItems": 2, "maxItems": 4},
            "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
)


def of_tokens(*texts: str) -> list[int]:
    ids: list[int] = []
    for text in texts:
        found = demo_vocabulary().encode(text.encode())
        assert found is not None
        ids += found
    return ids


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 60), st.sampled_from([ANY, PERSON]))
def test_under_the_masks_every_document_is_whole_and_fits(seed: int, budget: int, kit: Kit) -> None:
    least = kit.endings.shortest(kit.endings.reader.beginning)
    assert least is not None
    budget += len(least)
    constraint = kit.constraint(budget)
    draw = drawn_by(random.Random(seed))
    ids: list[int] = []
    while True:
        assert len(constraint.shortest_end) <= constraint.num_tokens_left == budget - len(ids)
        assert isinstance(json.loads(text_of(ids + constraint.shortest_end)), dict)
        step = constraint.advance([draw(constraint)])
        ids += step.ids
        if step.over:
            break
    assert len(ids) <= budget
    assert isinstance(json.loads(text_of(ids)), dict)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, NUM_IDS + 5), min_size=40, max_size=40), st.integers(2, 40), st.booleans())
def test_without_masks_too(ids: list[int], budget: int, masked: bool) -> None:
    """Nothing leans on the library: what does not continue the document ends it."""
    constraint = ANY.constraint(budget, masked=masked)
    reply: list[int] = []
    for id_ in ids:
        step = constraint.advance([id_])
        reply += step.ids
        if step.over:
            break
    assert step.over
    assert len(reply) <= budget
    assert isinstance(json.loads(text_of(reply)), dict)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(1, 40))
def test_a_smaller_budget_gives_a_beginning_and_its_shortest_end(seed: int, budget: int, more: int) -> None:
    longer, _ = write(ANY.constraint(budget + more), drawn_by(random.Random(seed)))
    shorter, cut = write(ANY.constraint(budget), drawn_by(random.Random(seed)))
    if not cut:
        assert shorter == longer
        return

    def ended(num_ids: int) -> list[int]:
        constraint = ANY.constraint(budget)
        constraint.replay(longer[:num_ids])
        return longer[:num_ids] + constraint.shortest_end

    assert shorter in [ended(num_ids) for num_ids in range(min(len(longer), len(shorter) + 1))]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 30))
def test_a_resumed_reply_goes_on_as_it_would_have(seed: int, at: int) -> None:
    whole, cut = write(PERSON.constraint(60), drawn_by(random.Random(seed)))
    again = PERSON.constraint(60)
    assert not again.replay(whole[: min(at, len(whole) - 1)]) or cut
    if at < len(whole) and not cut:
        for id_ in whole[at:]:
            assert id_ in allowed(again)
            step = again.advance([id_])
        assert step.over
    assert PERSON.constraint(60).replay(whole)


def test_the_shortest_end_counts_tokens_not_bytes() -> None:
    constraint = ANY.constraint(40)
    for id_ in of_tokens('{"', "a", '": [', "1", ', "', "x"):
        assert not constraint.advance([id_]).over
    end = constraint.shortest_end
    assert text_of(end) == '"]}'
    assert len(end) == 1, "one token spells it"


def test_the_least_budget() -> None:
    for budget, kit in ((0, ANY), (20, PERSON)):
        with pytest.raises(NoRoom) as refused:
            kit.constraint(min(budget, 3))
        least = kit.constraint(refused.value.num_tokens)
        ids, cut = write(least, lambda _: of_tokens('{"')[0])
        assert cut
        assert len(ids) == refused.value.num_tokens
        json.loads(text_of(ids))
    assert text_of(write(ANY.constraint(1 if len(of_tokens("{}")) == 1 else 2), lambda _: STOP_ID)[0]) == "{}"


def test_prefixes() -> None:
    constraint = ANY.constraint(8, prefix=b'{"a": [1, "x')
    ids, _ = write(constraint, lambda _: of_tokens("y")[0])
    assert json.loads('{"a": [1, "x' + text_of(ids)) == {"a": [1, "x" + "y" * (len(ids) - 1)]}
    for prefix, is_whole in ((b"Sure: {", False), (b"[", False), (b'{"a": 1}', True), (b'{"a"}', False)):
        with pytest.raises(NotABeginning) as refused:
            ANY.constraint(50, prefix=prefix)
        assert refused.value.is_whole is is_whole
    with pytest.raises(NotABeginning):
        PERSON.constraint(50, prefix=b'{"age"')


def test_end_of_turn_only_where_the_document_may_end() -> None:
    constraint = ANY.constraint(20)
    assert STOP_ID not in allowed(constraint)
    for id_ in of_tokens("{", '"a"', ":", "1"):
        assert not constraint.advance([id_]).over
        assert STOP_ID not in allowed(constraint)
    step = constraint.advance([STOP_ID])
    assert (step.over, step.cut, text_of(step.ids)) == (True, True, "}")
    constraint = ANY.constraint(20)
    step = constraint.advance(of_tokens("{}", "x"))
    assert (step.over, step.cut, text_of(step.ids)) == (True, False, "{}")


def test_characters_split_over_tokens_are_whole_at_the_cut() -> None:
    vocabulary = demo_vocabulary()
    bytes_of_emoji = [next(i for i, t in enumerate(vocabulary.tokens) if t == bytes((b,))) for b in "😀".encode()]
    for budget in range(4, 12):
        constraint = ANY.constraint(budget)
        ids: list[int] = []
        for id_ in [*of_tokens('{"'), *bytes_of_emoji * 4]:
            step = constraint.advance([id_])
            ids += step.ids
            if step.over:
                break
        assert step.cut
        json.loads(text_of(ids))


def test_no_half_of_a_surrogate_pair() -> None:
    constraint = ANY.constraint(30)
    for id_ in of_tokens('{"', "\\", "u", "d", "8", "3", "d"):
        assert not constraint.advance([id_]).over
    assert text_of(constraint.shortest_end).startswith("\\u")
    step = constraint.advance(of_tokens('"'))
    assert step.cut
    json.loads('{"\\ud83d' + text_of(step.ids)).popitem()[0].encode("utf-8")


def test_nesting_is_bounded() -> None:
    constraint = ANY.constraint(2000)
    ids: list[int] = []
    for id_ in [*of_tokens('{"a":'), *of_tokens("[") * 500]:
        step = constraint.advance([id_])
        ids += step.ids
        if step.over:
            break
    assert step.over
    depth = text_of(ids).count("[") + 1
    assert MAX_DEPTH - 3 <= depth <= MAX_DEPTH
    json.loads(text_of(ids))


def test_a_vocabulary_without_json() -> None:
    compiled = ANY.endings.reader
    letters = Vocabulary([b"", b"a", b"b"], [0], 3)
    with pytest.raises(NotSpellable):
        Constraint(Endings(compiled, letters), prefix=b"", max_tokens=50)
    no_colon = Vocabulary([b"", *(bytes((b,)) for b in range(256) if b != ord(":"))], [0], 256)
    constraint = Constraint(Endings(compiled, no_colon), prefix=b"", max_tokens=50)
    ids = [1 + b - (b > ord(":")) for b in b'{"a"']
    step = constraint.advance(ids)
    assert step.over, "a member could never be written: the first quote is not taken"
    assert b"".join(map(no_colon.bytes_of, step.ids)) == b"{}"


@pytest.mark.parametrize("more", [[], [b"", b'{"']])
@pytest.mark.parametrize("stop_ids", [[], [151645]])
def test_masks_of_a_vocabulary_without_an_end_of_turn(stop_ids: list[int], more: list[bytes]) -> None:
    """Directories name no end, or one of a larger vocabulary."""
    tokens = [bytes((byte,)) for byte in range(256)] + more
    vocabulary = Vocabulary(tokens, stop_ids, len(tokens))
    compiled = compile_grammar(ANY_OBJECT)
    matcher = TokenMasks(vocabulary).compile(compiled.lark).matcher()
    constraint = Constraint(Endings(compiled.reader, vocabulary), prefix=b"", max_tokens=40, matcher=matcher)
    row = np.zeros(-(-len(tokens) // 32), dtype=np.int32)
    constraint.fill(row)
    assert [id_ for id_ in range(len(tokens)) if row[id_ >> 5] >> (id_ & 31) & 1 and tokens[id_][:1] != b"{"] == []
    step = constraint.advance(list(b'{"a":1}'))
    assert (step.over, step.cut, bytes(step.ids)) == (True, False, b'{"a":1}')
