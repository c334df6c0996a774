"""The prefix cache: which computed pages a request can begin with, and its own pages made findable for others.

Owns how a sequence of ids becomes page hashes. Knows no policy and no tensors.

A page's hash covers everything its keys and values depend on, by a chain from the root:

    root(revision, model, page size, salt) ──▶ H(root, ids of page 0) ──▶ H(…, ids of page 1) ──▶ …

so a page is found under the same salt and behind the same ids only. Output ids are hashed like prompt ids.
"""

from __future__ import annotations

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

    def _hash(self, request: Request, index: int) -> bytes:
        hashes = request.page_hashes
        size = self._tokens_per_page[request.model]
        while len(hashes) <= index:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else _digest(self._roots[request.model] + request.salt)
            hashes.append(_digest(parent + pack_ids(request.token_ids[start : start + size])))
        return hashes[index]


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=32).digest()
