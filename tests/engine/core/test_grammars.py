"""Requests in JSON mode inside the core: grammars come in a thread, documents survive whatever befalls them."""

from __future__ import annotations

import json
import random

import msgspec
import pytest
from support.fake_core import NUM_IDS, STOP_ID, FakeCore, FakeDrafter, add_request, prompt_of

from aiexport_edge.engine.core.grammars import Grammars, Prepared
from aiexport_edge.engine.core.protocol import AddRequest, AddVocabulary, FinishReason, pack_ids
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.structured.compile import ANY_OBJECT, compile_grammar
from aiexport_edge.engine.structured.packed import pack

TEXTS = [
    "{",
    "}",
    "[",
    "]",
    '"',
    ":",
    ",",
    "",
    '{"',
    '":',
    '",',
    '"}',
    "}}",
    "]}",
    '"]',
    "[[",
    " ",
    "\n",
    "true",
    "null",
]
TEXTS += [*"0123456789", *"abcdefx", "\\n", "é", '": ']
WORDS = AddVocabulary(0, [text.encode() for text in TEXTS], [STOP_ID])
SCHEMA = pack(
    compile_grammar(
        json.dumps(
            {
                "type": "object",
                "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"enum": ["x", "abc"]}},
                "required": ["a", "b"],
                "additionalProperties": False,
            }
        ).encode()
    )
)


def request(handle: int, rng: random.Random, max_tokens: int, grammar: bytes = ANY_OBJECT) -> AddRequest:
    message = add_request(handle, prompt_of(rng, 5), max_tokens=max_tokens, stop_ids=[STOP_ID], salt=b"s")
    return msgspec.structs.replace(message, grammar=grammar)


def prepared(grammars: Grammars) -> list[Prepared]:
    found: list[Prepared] = []
    while grammars.busy:
        found += grammars.ready(at_most_s=30.0)
    return found


def text_of(ids: list[int]) -> str:
    return b"".join(WORDS.tokens[id_] for id_ in ids).decode()


@pytest.fixture
def grammars() -> Grammars:
    assert len(TEXTS) == NUM_IDS
    made = Grammars()
    made.learn(WORDS)
    return made


def outputs(
    messages: list[AddRequest],
    grammars: Grammars,
    *,
    guesses: list[list[int]] | None = None,
    **core: int | bool,
) -> tuple[FakeCore, list[list[int]]]:
    """What a core answers to them. `guesses` by message: drafts are of these, every fifth a wrong one."""
    fake = FakeCore(guess_rate=None if guesses is None else 0.0, **core)  # type: ignore[arg-type]
    for message in messages:
        grammars.submit(message)
    for made in prepared(grammars):
        added = fake.add(made.message)
        added.constraint = made.constraint
        if guesses is not None:
            added.drafter = Recalling(added, guesses[messages.index(made.message)])  # type: ignore[assignment]
    fake.run()
    return fake, [fake.replies[message.handle].ids for message in messages]


class Recalling(FakeDrafter):
    """Knows an earlier answer to the same."""

    def __init__(self, request: Request, answer: list[int]) -> None:
        super().__init__(request, 1.0)
        self._answer = answer

    def guesses(self, most: int) -> tuple[int, ...]:
        first = self._request.num_output_tokens
        return tuple(id_ if n % 5 else 3 for n, id_ in enumerate(self._answer[first : first + most], first + 1))


@pytest.mark.parametrize("overlaps", [False, True])
def test_documents_are_the_same_whole_ones_where_memory_is_short(grammars: Grammars, overlaps: bool) -> None:
    rng = random.Random(11)
    messages = [request(n, rng, rng.randint(14, 60), (ANY_OBJECT, SCHEMA)[n % 2]) for n in range(12)]
    roomy, expected = outputs(messages, grammars, num_pages=400)
    short, found = outputs(messages, grammars, num_pages=24, overlaps=overlaps)
    assert short.scheduler.num_preemptions > roomy.scheduler.num_preemptions == 0
    assert found == expected
    for message, ids in zip(messages, found, strict=True):
        reply = short.replies[message.handle]
        assert isinstance(json.loads(text_of(ids)), dict)
        assert len(ids) <= message.max_tokens
        assert reply.reason in (FinishReason.END_TURN, FinishReason.MAX_TOKENS)


@pytest.mark.parametrize("overlaps", [False, True])
def test_documents_are_the_same_with_drafts(grammars: Grammars, overlaps: bool) -> None:
    """Some guesses do not fit the grammar, some are not what is drawn, some are right."""
    rng = random.Random(12)
    messages = [request(n, rng, rng.randint(14, 40), (ANY_OBJECT, SCHEMA)[n % 2]) for n in range(8)]
    _, expected = outputs(messages, grammars, num_pages=200, overlaps=overlaps)
    drafted, found = outputs(messages, grammars, num_pages=200, overlaps=overlaps, guesses=expected)
    assert found == expected
    assert drafted.scheduler.num_accepted_tokens[0] > len(messages)
    assert drafted.scheduler.num_guessed_tokens[0] > drafted.scheduler.num_accepted_tokens[0]
    for message, ids in zip(messages, found, strict=True):
        assert len(ids) <= message.max_tokens
        assert isinstance(json.loads(text_of(ids)), dict)


def test_a_request_goes_on_from_the_ids_of_an_earlier_attempt(grammars: Grammars) -> None:
    rng = random.Random(13)
    message = request(1, rng, 50)
    _, (whole,) = outputs([message], grammars, num_pages=400)
    assert len(whole) > 4
    again = msgspec.structs.replace(message, output_ids=pack_ids(whole[:3]))
    _, (rest,) = outputs([again], grammars, num_pages=400)
    assert whole[:3] + rest == whole
    grammars.submit(msgspec.structs.replace(message, output_ids=pack_ids(whole)))
    assert [made.is_whole for made in prepared(grammars)] == [True]


def test_a_grammar_that_cannot_be_made_ends_its_request_alone(
    grammars: Grammars, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(14)
    grammars.submit(request(1, rng, 20, b'{"type":"unheard of"}'))
    grammars.submit(request(2, rng, 20))
    found = prepared(grammars)
    assert [(made.message.handle, made.constraint is None) for made in found] == [(1, True), (2, False)]
    assert "handle 1" in capsys.readouterr().err


def test_a_request_that_is_withdrawn_does_not_come_back(grammars: Grammars) -> None:
    rng = random.Random(15)
    grammars.submit(request(1, rng, 20, SCHEMA))
    grammars.submit(request(2, rng, 20, SCHEMA))
    assert grammars.withdraw(1)
    assert not grammars.withdraw(1)
    assert [made.message.handle for made in prepared(grammars)] == [2]
    assert not grammars.busy
