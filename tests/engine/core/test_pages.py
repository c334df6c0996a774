"""The page pool against a plain model of it, and the rules that other parts rely on."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiexport_edge.engine.core.pages import PagePool

NUM_PAGES = 9


def key(number: int) -> bytes:
    return b"hash %d" % number


class PoolMachine(RuleBasedStateMachine):
    """Sequences of pages come, are published, shared and released at random; the model knows what each page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.sequences: list[list[int]] = []
        self.published: dict[int, int] = {}  # page → number of its hash, as long as the page may be found
        self.next_number = 0

    @rule(count=st.integers(0, NUM_PAGES))
    def take(self, count: int) -> None:
        if count > self.pool.num_available:
            with pytest.raises(AssertionError):
                self.pool.take(count)
            return
        free_before = self.pool.num_free
        pages = self.pool.take(count)
        assert len(set(pages)) == count
        assert 0 not in pages
        assert not {page for sequence in self.sequences for page in sequence} & set(pages), "in other hands"
        if count <= free_before:
            assert not set(pages) & self.published.keys(), "nothing is evicted while pages are free"
        for page in pages:
            self.published.pop(page, None)
        self.sequences.append(pages)

    @precondition(lambda self: any(self.sequences))
    @rule(data=st.data(), again=st.booleans())
    def publish(self, data: st.DataObject, again: bool) -> None:
        pages = sorted({page for sequence in self.sequences for page in sequence} - self.published.keys())
        if not pages:
            return
        page = data.draw(st.sampled_from(pages))
        if again and self.published:
            number = data.draw(st.sampled_from(sorted(self.published.values())))
            owner = self.pool.find(key(number))
            self.pool.publish(page, key(number))
            assert self.pool.find(key(number)) == owner, "the first to publish stays"
            return
        self.pool.publish(page, key(self.next_number))
        self.published[page] = self.next_number
        self.next_number += 1

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.published.values())))
        page = self.pool.find(key(number))
        assert page is not None
        self.pool.share([page])
        assert self.pool.is_used(page)
        self.sequences.append([page])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(index))

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        held = {page for sequence in self.sequences for page in sequence}
        assert self.pool.num_used == len(held)
        assert self.pool.num_total == NUM_PAGES - 1
        assert self.pool.num_available == NUM_PAGES - 1 - len(held)
        for page, number in self.published.items():
            assert self.pool.find(key(number)) == page
        for page in range(1, NUM_PAGES):
            assert self.pool.is_used(page) == (page in held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_least_recently_released_goes_first() -> None:
    pool = PagePool(4)
    pages = pool.take(3)
    for number, page in enumerate(pages):
        pool.publish(page, key(number))
    for page in (pages[1], pages[0], pages[2]):
        pool.release([page])
    pool.take(1)
    assert [pool.find(key(number)) for number in range(3)] == [pages[0], None, pages[2]]
    pool.share([pages[0]])  # used, so safe, and the most recent when released again
    pool.release([pages[0]])
    pool.take(1)
    assert [pool.find(key(number)) for number in range(3)] == [pages[0], None, None]


def test_a_prefix_outlives_its_tails() -> None:
    pool = PagePool(4)
    pages = pool.take(3)
    for number, page in enumerate(pages):
        pool.publish(page, key(number))
    pool.release(pages)
    pool.take(2)
    assert [pool.find(key(number)) for number in range(3)] == [pages[0], None, None]


def test_a_page_computed_twice_stays_its_holders_own() -> None:
    pool = PagePool(3)
    first, second = pool.take(2)
    pool.publish(first, key(0))
    pool.publish(second, key(0))
    pool.release([second])
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.release([first])
    assert (pool.num_free, pool.num_cached) == (1, 1)
    assert pool.find(key(0)) == first
    pool.check()


def test_check_finds_a_leak() -> None:
    pool = PagePool(4)
    pool._free.pop()
    with pytest.raises(AssertionError):
        pool.check()


def test_releasing_twice_is_a_bug() -> None:
    pool = PagePool(3)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(pages)
