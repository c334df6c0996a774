"""Adapters' places on the device: a held one never changes hands, the least recently used makes room."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiexport_edge.engine.core.adapter_slots import AdapterSlots


def test_the_least_recently_used_makes_room() -> None:
    slots = AdapterSlots(2)
    first, second = slots.take(b"a"), slots.take(b"b")
    assert first is not None
    assert second is not None
    assert {first, second} == {0, 1}
    assert slots.take(b"c") is None
    assert slots.take(b"a") == first
    slots.give_back(first)
    slots.give_back(second)
    assert slots.take(b"c") == second, "a is still held"
    slots.give_back(first)
    assert slots.take(b"a") == first, "it was still there"


def test_no_slots() -> None:
    assert AdapterSlots(0).take(b"a") is None


class Worlds(RuleBasedStateMachine):
    """Random requests over few slots."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = AdapterSlots(3)
        self.held: list[tuple[int, bytes]] = []

    @rule(number=st.integers(0, 6))
    def take(self, number: int) -> None:
        digest = bytes([number])
        slot = self.slots.take(digest)
        others = {held for held, adapter in self.held if adapter != digest}
        if slot is None:
            assert len(others) == 3
        else:
            assert slot not in others
            assert {held for held, adapter in self.held if adapter == digest} <= {slot}
            self.held.append((slot, digest))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        slot, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.slots.give_back(slot)

    @invariant()
    def counts(self) -> None:
        assert self.slots.num_used == len({slot for slot, _ in self.held})


TestWorlds = Worlds.TestCase


@given(st.lists(st.integers(0, 9), max_size=60))
def test_one_after_the_other_all_get_a_place(numbers: list[int]) -> None:
    slots, uses = AdapterSlots(2), Counter[int]()
    for number in numbers:
        slot = slots.take(bytes([number]))
        assert slot is not None
        uses[slot] += 1
        slots.give_back(slot)
    assert set(uses) <= {0, 1}
