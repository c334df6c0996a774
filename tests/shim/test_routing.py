"""Which engine a request goes to: bounded load, affinity that outlives engines coming and going, nobody left out."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines import prefixes, routing
from aiexport_edge.shim.engines.prefixes import Trail, trail
from aiexport_edge.shim.engines.routing import EPSILON, SLACK, Candidate, Choice, Policy, Reason, Router

SYSTEM = "You answer questions about the harbour of a small town. " * 12
ROLES = {"system": pb.ROLE_SYSTEM, "user": pb.ROLE_USER, "assistant": pb.ROLE_ASSISTANT}


def request(*turns: tuple[str, str], salt: bytes = b"salt", model: str = "m") -> pb.GenerateRequest:
    messages = [pb.Message(role=ROLES[role], content=[pb.ContentBlock(text=text)]) for role, text in turns]
    return pb.GenerateRequest(model=model, chat=pb.Chat(messages=messages), tenant=pb.Tenant(cache_salt=salt))


def engines(*loads: float, memories: tuple[int, ...] = ()) -> list[Candidate]:
    numbers = memories or tuple(range(len(loads)))
    return [
        Candidate(f"engine-{index}:1", number, load)
        for index, (number, load) in enumerate(zip(numbers, loads, strict=True))
    ]


def place(router: Router, found: Trail, candidates: list[Candidate]) -> Choice:
    choice = router.choose(found, candidates)
    router.placed(found, candidates[choice.index].memory)
    return choice


# ---------------------------------------------------------------------------------------------------- hashes


def test_a_later_turn_has_the_boundaries_of_an_earlier_one() -> None:
    first = [("system", SYSTEM), ("user", "How deep is it? " * 20)]
    later = [*first, ("assistant", "Nine metres. " * 10), ("user", "And at low tide?" * 10)]
    one, two = trail(request(*first)), trail(request(*later))
    assert two.digests[: len(one.digests)] == one.digests
    assert one.head == two.head
    assert len(two.digests) > len(one.digests)
    assert list(two.chars) == sorted(set(two.chars))


def test_nothing_is_shared_between_tenants_models_or_roles() -> None:
    turns = [("system", SYSTEM), ("user", "How deep is it? " * 20)]
    trails = [
        trail(request(*turns)),
        trail(request(*turns, salt=b"another")),
        trail(request(*turns, model="another")),
        trail(request(("user", SYSTEM), turns[1])),
        trail(request(("system", SYSTEM + turns[1][1]))),
    ]
    digests = [digest for each in trails[:4] for digest in each.digests]
    assert len(set(digests)) == len(digests)
    assert len({each.head for each in trails}) == len(trails)


def test_the_text_decides_not_how_it_is_cut_into_blocks() -> None:
    text = SYSTEM * 3
    whole = request(("user", text))
    cut = pb.GenerateRequest()
    cut.CopyFrom(whole)
    del cut.chat.messages[0].content[:]
    cut.chat.messages[0].content.extend(
        [pb.ContentBlock(text=text[:7]), pb.ContentBlock(text=text[7:900]), pb.ContentBlock(text=text[900:])]
    )
    assert trail(cut) == trail(whole)


def test_pictures_count_by_their_files() -> None:
    """Not by the names that an engine has given to them."""

    def seen(data: bytes, upload_id: str) -> Trail:
        asked = request(("user", "What is this?"))
        block = pb.ContentBlock(image=pb.Image(upload_id=upload_id))
        asked.chat.messages[0].content.insert(0, block)
        return trail(asked, [data])

    large = bytes(300_000)
    assert seen(large, "a") == seen(large, "b")
    others = [large[:-1], b"\1" + large[1:], large[:-1] + b"\1", large[:150_000] + b"\1" + large[150_001:], b""]
    assert len({seen(data, "a").head for data in [large, *others]}) == 6


def test_any_prompt_has_few_boundaries() -> None:
    huge = trail(request(("system", SYSTEM), ("user", "é" * 1_000_000)))
    assert huge.num_chars == prefixes.MAX_CHARS
    many = trail(request(*[("user", "short ") for _ in range(10_000)]))
    mixed = trail(request(*[("user", "x" * (50 + 37 * i % 400)) for i in range(5_000)]))
    assert max(len(each.digests) for each in (huge, many, mixed)) <= 90


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=1500)), max_size=8), st.data())
def test_two_conversations_share_boundaries_as_far_as_they_are_the_same(
    turns: list[tuple[str, str]], data: st.DataObject
) -> None:
    number = data.draw(st.integers(0, len(turns)))
    other = [*turns[:number], ("user", data.draw(st.text(max_size=1500)))]
    one, two = trail(request(*turns)), trail(request(*other))
    shared_chars = sum(len(text) for _, text in turns[:number])
    for digests, chars in ((one.digests, one.chars), (two.digests, two.chars)):
        for digest, end in zip(digests, chars, strict=True):
            there = digest in one.digests and digest in two.digests
            # A boundary inside what is the same is found in both: but for the last message's end, which the next
            # message may be too near to.
            if end < shared_chars:
                assert there
    equal = set(one.digests) & set(two.digests)
    assert [d for d in one.digests if d in equal] == list(one.digests[: len(equal)])


# ---------------------------------------------------------------------------------------------------- choices


def test_a_conversation_stays_where_it_is() -> None:
    router = Router()
    turns = [("system", SYSTEM), ("user", "How deep is it? " * 20)]
    first = place(router, trail(request(*turns)), engines(0, 0, 0))
    assert first.reason is Reason.HASH
    for number in range(5):
        turns += [("assistant", f"{number} metres. " * 20), ("user", f"And {number}? " * 20)]
        loads = [2.0] * 3
        loads[first.index] = 3.0  # busier than the others, within the slack
        later = place(router, trail(request(*turns)), engines(*loads))
        assert (later.index, later.reason) == (first.index, Reason.PREFIX)
        assert later.chars > 0


def test_shims_that_know_nothing_of_each_other_agree() -> None:
    for number in range(20):
        found = trail(request(("system", SYSTEM), ("user", f"Question {number}")))
        order = engines(0, 0, 0, 0)
        reverse = list(reversed(order))
        one, two = Router().choose(found, order), Router().choose(found, reverse)
        assert order[one.index].name == reverse[two.index].name


def test_an_engine_that_goes_moves_only_its_own() -> None:
    before, after = engines(0, 0, 0, 0), engines(0, 0, 0, 0)[:3]
    moved = 0
    for number in range(200):
        found = trail(request(("user", f"Question {number}: {SYSTEM}")))
        was, now = Router().choose(found, before), Router().choose(found, after)
        if was.index != now.index:
            moved += 1
            assert was.index == 3
    assert 20 <= moved <= 90  # a quarter, give or take


def test_what_everybody_shares_is_spread_when_it_is_hot() -> None:
    """2,000 requests in flight with one system prompt: no engine has more than its bound."""
    router, loads = Router(), [0.0] * 4
    for number in range(2000):
        choice = place(router, trail(request(("system", SYSTEM), ("user", f"{number}"))), engines(*loads))
        loads[choice.index] += 1
    assert max(loads) <= math.ceil((1 + EPSILON) * 500) + 1
    assert min(loads) > 0


def test_an_engine_that_lost_its_memory_is_not_sought_for_it() -> None:
    router = Router()
    found = trail(request(("system", SYSTEM), ("user", "How deep is it?")))
    first = place(router, found, engines(0, 0))
    memories = (10, 1) if first.index == 0 else (0, 11)  # it has restarted
    assert router.choose(found, engines(0, 0, memories=memories)).reason is Reason.HASH


def test_a_match_of_less_than_half_is_no_reason() -> None:
    router = Router()
    place(router, trail(request(("system", SYSTEM), ("user", "x"))), engines(0, 0))
    long = trail(request(("system", SYSTEM), ("user", "a document of its own. " * 200)))
    assert router.choose(long, engines(0, 0)).reason is Reason.HASH


def test_short_prompts_go_by_load_each_in_turn() -> None:
    router, found = Router(), trail(request(("user", "Hello")))
    chosen = Counter(router.choose(found, engines(0, 0, 0)).index for _ in range(30))
    assert set(chosen.values()) == {10}
    assert router.choose(found, engines(3, 1, 2)) == Choice(1, Reason.LOAD)


def test_round_robin_and_least_load_know_no_prefix() -> None:
    found = trail(request(("system", SYSTEM), ("user", "How deep is it?")))
    turns = Router(Policy.ROUND_ROBIN)
    assert Counter(turns.choose(found, engines(9, 0, 0)).index for _ in range(30)) == {0: 10, 1: 10, 2: 10}
    loads = Router(Policy.LEAST_LOAD)
    loads.placed(found, 0)
    assert loads.choose(found, engines(2, 1, 3)) == Choice(1, Reason.LOAD)


def test_memory_is_bounded_and_the_oldest_goes_first() -> None:
    router = Router(max_prefixes=50)
    early = trail(request(("system", SYSTEM), ("user", "early" * 100)))
    place(router, early, engines(0, 0))
    for number in range(100):
        place(router, trail(request(("user", f"{number} " * 200))), engines(0, 0))
    assert len(router._holders) == 50
    assert router.choose(early, engines(0, 0)).reason is Reason.HASH


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3), st.integers(0, 8)), max_size=60),
    st.sampled_from(Policy),
)
def test_every_request_is_placed_within_the_bound(
    start: list[int], steps: list[tuple[int, int, int]], policy: Policy
) -> None:
    """Whatever was placed before and however load is spread: the choice is a candidate, and below the bound."""
    router, loads = Router(policy), [float(load) for load in start]
    for conversation, turn, ends in steps:
        turns = [("system", SYSTEM), ("user", f"{conversation} " * 50)]
        turns += [("assistant", "yes " * 30), ("user", "more " * 30)] * turn
        candidates = engines(*loads)
        choice = place(router, trail(request(*turns)), candidates)
        assert 0 <= choice.index < len(candidates)
        if policy is Policy.PREFIX and len(candidates) > 1:
            assert loads[choice.index] + 1 <= max(routing.bound(candidates), SLACK)
        if policy is Policy.LEAST_LOAD:
            assert loads[choice.index] == min(loads)
        loads[choice.index] += 1
        loads[ends % len(loads)] = max(0.0, loads[ends % len(loads)] - 1)
