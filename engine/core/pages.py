"""The page pool: equal-byte pages for every model of a core, their reference counts, and the prefix cache over them.

Owns which page is free, cached or used. Knows no tensors, requests or models: a page is a number, and what it holds is
known by a hash alone. Page 0 is never handed out (rows that pad a batch write there) and is in no count.

    free     in nobody's hands, content worthless
    cached   in nobody's hands, content found again by its hash; the least recently released goes first
    used     in the hands of one request or, if it has a hash, of several; who shares a page never writes to it

    free + cached + used == total, always
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class PagePool:
    """Pages 1 … num_pages - 1. Every operation is O(1) for each page it is given."""

    __slots__ = ("_cached", "_free", "_hashes", "_pages", "_refs", "num_total")

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, "page 0 is reserved, so a pool needs two"
        self.num_total = num_pages - 1
        self._refs = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}  # the one page that each hash is found at
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: the page freed last is the warmest

    @property
    def num_free(self) -> int:
        """Pages whose content is worthless."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Unreferenced pages that are found again by their hash."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages that requests hold."""
        return self.num_total - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out: free and cached."""
        return len(self._free) + len(self._cached)

    def find(self, hash_: bytes) -> int | None:
        """The page that holds what `hash_` stands for. It is the caller's only after `share`."""
        return self._pages.get(hash_)

    def is_used(self, page: int) -> bool:
        """Whether some request holds the page."""
        return self._refs[page] > 0

    def take(self, num_pages: int) -> list[int]:
        """Hand out writable pages, evicting cached ones when the free ones do not suffice."""
        assert num_pages <= self.num_available, "the caller checks num_available"
        free, refs = self._free, self._refs
        pages = []
        for _ in range(num_pages):
            page = free.pop() if free else self._evict()
            refs[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Take another reference to pages that `find` gave."""
        for page in pages:
            if not self._refs[page]:
                del self._cached[page]
            self._refs[page] += 1

    def publish(self, page: int, hash_: bytes) -> None:
        """Let a used page be found by its hash: it is full, computed, and never written again.

        Where another page is found by this hash already (two requests computed the same prefix at once), this one
        stays its holder's own and is free when released.
        """
        assert self._refs[page] > 0
        assert self._hashes[page] is None
        if self._pages.setdefault(hash_, page) == page:
            self._hashes[page] = hash_

    def forget(self, pages: Iterable[int]) -> None:
        """Let used pages be found no more: what they hold is not to be trusted."""
        for page in pages:
            assert self._refs[page] > 0
            hash_ = self._hashes[page]
            if hash_ is not None:
                del self._pages[hash_]
                self._hashes[page] = None

    def release(self, pages: list[int]) -> None:
        """Drop one reference to each page of a sequence. Its last page goes first: a prefix outlives its tails."""
        refs = self._refs
        for page in reversed(pages):
            refs[page] -= 1
            assert refs[page] >= 0, "released more often than taken"
            if not refs[page]:
                if self._hashes[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def check(self) -> None:
        """Assert that the books balance; O(pages), for idle moments and tests."""
        free, cached = set(self._free), set(self._cached)
        used = {page for page in range(1, self.num_total + 1) if self._refs[page]}
        assert len(free) == len(self._free)
        assert not free & cached
        assert not free & used
        assert not cached & used
        assert len(free) + len(cached) + len(used) == self.num_total
        assert len(used) == self.num_used
        assert min(self._refs) >= 0
        assert self._refs[0] == 0
        hashed = {page: hash_ for page, hash_ in enumerate(self._hashes) if hash_ is not None}
        assert self._pages == {hash_: page for page, hash_ in hashed.items()}
        assert cached <= hashed.keys() <= cached | used

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        hash_ = self._hashes[page]
        assert hash_ is not None
        del self._pages[hash_]
        self._hashes[page] = None
        return page
