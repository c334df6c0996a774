"""Ranges of code points as sequences of byte ranges in UTF-8 (RFC 3629), so that an automaton can read bytes.

The split follows R. Cox, "Regular Expression Matching in the Wild" (2010), and Rust's `utf8-ranges`.
"""

from __future__ import annotations

from collections.abc import Iterator

_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)


def byte_ranges(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
    """Sequences of inclusive byte ranges that together match exactly the code points low…high, no surrogate in them."""
    for last in _LAST_OF_LENGTH:
        if low <= last < high:
            yield from byte_ranges(low, last)
            yield from byte_ranges(last + 1, high)
            return
    if high <= 0x7F:
        yield [(low, high)]
        return
    for shift in (6, 12, 18):
        mask = (1 << shift) - 1
        if low & ~mask != high & ~mask:
            if low & mask:
                yield from byte_ranges(low, low | mask)
                yield from byte_ranges((low | mask) + 1, high)
                return
            if high & mask != mask:
                yield from byte_ranges(low, (high & ~mask) - 1)
                yield from byte_ranges(high & ~mask, high)
                return
    yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))
