"""The prefix cache: which computed pages a request can begin with, its own pages made findable for others, and which
pages are being computed just now, so that a request with the same beginning can wait for them.

Owns how a sequence of ids becomes page hashes. Knows no policy and no tensors.

A page's hash covers everything its keys and values depend on, by a chain from the root:

    root(revision, model, page size, salt, adapter) ──▶ H(root, ids of page 0) ──▶ H(…, ids of page 1) ──▶ …

A picture's tokens are all alike: the hash of a page that any of them lie in also covers the picture's digest, grid and
place. So a page is found under the same salt and adapter and behind the same ids only. Output ids are hashed like
prompt ids.
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Sequence
from hashlib import blake2b

from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.protocol import pack_ids
from aiexport_edge.engine.core.request import Request


class PrefixCache:
    """Finds and publishes pages of `pool`. `revisions` and `tokens_per_page` are by model."""

    def __init__(self, pool: PagePool, *, revisions: Sequence[str], tokens_per_page: Sequence[int]) -> None:
        self._pool = pool
        self._tokens_per_page = tokens_per_page
        self._expected: Counter[bytes] = Counter()  # pages that are being computed
        self._planned: list[bytes] = []  # those of them that the plan in the making fills
        self._flights: deque[list[bytes]] = deque()  # and those that plans in flight fill
        # One revision can be loaded twice, in different types: the model's number keeps their pages apart.
        self._roots = [
            b"%d %d %d %s " % (model, size, len(revision.encode()), revision.encode())
            for model, (revision, size) in enumerate(zip(revisions, tokens_per_page, strict=True))
        ]

    def find(self, request: Request) -> list[int]:
        """The pages of the longest cached run that `request` can begin with; its last token is always computed, for its
        logits. The pages are the caller's only after `PagePool.share`."""
        pages: list[int] = []
        for index in range((len(request.token_ids) - 1) // self._tokens_per_page[request.model]):
            page = self._pool.find(self._hash(request, index))
            if page is None:
                break
            pages.append(page)
        return pages

    def publish(self, request: Request, num_tokens: int) -> None:
        """Let the pages that the first `num_tokens` of `request` fill be found: they are computed, their ids known."""
        full = num_tokens // self._tokens_per_page[request.model]
        for index in range(request.num_published_pages, full):
            self._pool.publish(request.pages[index], self._hash(request, index))
        request.num_published_pages = full

    def expect(self, request: Request, start: int, end: int) -> None:
        """Note that the plan in the making fills pages by computing from `start` to `end`, which will be published."""
        size = self._tokens_per_page[request.model]
        hashes = [self._hash(request, index) for index in range(start // size, end // size)]
        self._expected.update(hashes)
        self._planned += hashes

    def launch(self) -> None:
        """The plan in the making is in flight."""
        self._flights.append(self._planned)
        self._planned = []

    def settle(self) -> None:
        """The oldest plan in flight is over: what it fills is published, or will not be."""
        hashes = self._flights.popleft()
        self._expected.subtract(hashes)
        for hash_ in hashes:
            if not self._expected[hash_]:
                del self._expected[hash_]

    def is_worth_waiting(self, request: Request, num_pages: int) -> bool:
        """Whether others are computing at least half of what `request`, with `num_pages` cached, would compute."""
        if not self._expected:
            return False
        size, num_tokens = self._tokens_per_page[request.model], len(request.token_ids)
        index, last = num_pages, (num_tokens - 1) // size
        while index < last and self._hash(request, index) in self._expected:
            index += 1
        return index > num_pages and 2 * (index - num_pages) * size >= num_tokens - num_pages * size

    def _hash(self, request: Request, index: int) -> bytes:
        hashes = request.page_hashes
        size = self._tokens_per_page[request.model]
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else self._root(request)
            ids = pack_ids(request.token_ids[start : start + size])
            hashes.append(_digest(parent + ids + _pictures(request, start, start + size)))
        return hashes[index]

    def _root(self, request: Request) -> bytes:
        root = _digest(self._roots[request.model] + request.salt)
        return root if request.adapter is None else _digest(b"adapter " + root + request.adapter.digest)


def _pictures(request: Request, start: int, end: int) -> bytes:
    """What the ids from `start` to `end` do not say of the pictures that they stand for."""
    return b"".join(
        [
            image.digest + struct.pack("<3I", image.start, image.rows, image.columns)
            for image, span in zip(request.images, request.spans, strict=True)
            if span.start < end and start < span.end
        ]
    )


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=32).digest()
