"""Which engine a request goes to: where the beginning of its conversation is still in memory, unless that one is busy.

Owns what is remembered of earlier requests: the hashes of their beginnings (`prefixes.py`) and where each went, the
least recently used forgotten first. Knows no connection and no engine's health: it is given those that can serve.

    known beginning, half the prompt or more ──▶ the engine that has most of it     ┐ of those whose load is below
    a new one of MIN_CHARS or more           ──▶ highest random weight of its head  ┘ the bound
    a short one                              ──▶ the least loaded

The bound is that of consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, SODA 2018): no engine gets
more than 1 + EPSILON times the mean, so a beginning that everybody shares is spread as it becomes hot, and an engine
below the bound always exists. The order of preference for a new beginning is rendezvous hashing (Thaler, Ravishankar,
1998): shims that have nothing in common but the list of engines place the same conversation alike, and an engine that
comes or goes moves only its own share. Remembering where prompts went, and giving up on a match of less than half of
the prompt, is what SGLang's router does (its cache-aware policy, on a tree of texts; here hashes, of bounded memory).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from aiexport_edge.shim.engines.prefixes import Trail

EPSILON = 0.25
SLACK = 4  # requests that an engine may have, whatever the mean, for the sake of what it has in memory
MIN_CHARS = 256  # about the smallest page of a prefix cache
MIN_SHARE = 0.5  # of the prompt, that an engine must have seen to be preferred for it
MAX_PREFIXES = 32_768  # about 8 MB
MAX_HOLDERS = 4  # of one beginning, that are remembered


class Policy(StrEnum):
    """How an engine is chosen (`[shim] routing`)."""

    PREFIX = "prefix"
    LEAST_LOAD = "least-load"
    ROUND_ROBIN = "round-robin"


class Reason(StrEnum):
    """Why an engine was chosen, for the metrics."""

    ONLY = "only"  # no other could serve
    PREFIX = "prefix"  # it has seen the beginning
    HASH = "hash"  # a new beginning
    LOAD = "load"  # the least loaded
    TURN = "turn"  # round robin


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that can serve. `name` is the same in every shim; `memory` is a number for what it has cached, another
    one after it has lost that; `load` is how many requests it has.
    """

    name: str
    memory: int
    load: float


@dataclass(frozen=True, slots=True)
class Choice:
    """`index` of the candidate; `chars` of the prompt that it has seen before."""

    index: int
    reason: Reason
    chars: int = 0


class Router:
    """One process's. `choose`, then `placed` once the engine has taken the request."""

    def __init__(self, policy: Policy = Policy.PREFIX, *, max_prefixes: int = MAX_PREFIXES) -> None:
        self.policy = policy
        self._max_prefixes = max_prefixes
        self._holders: OrderedDict[int, tuple[int, ...]] = OrderedDict()  # digest → memories, the latest first
        self._turn = 0

    def choose(self, trail: Trail, candidates: Sequence[Candidate]) -> Choice:
        """There is at least one candidate."""
        if len(candidates) == 1:
            return Choice(0, Reason.ONLY)
        self._turn += 1
        if self.policy is Policy.ROUND_ROBIN:
            return Choice(self._turn % len(candidates), Reason.TURN)
        if self.policy is Policy.LEAST_LOAD or trail.num_chars < MIN_CHARS:
            return self._least_loaded(candidates)
        fair = bound(candidates)
        found = self._known(trail, candidates, max(fair, SLACK))
        if found is not None:
            return found
        weights = sorted(
            ((_weight(trail.head, candidate.name), index) for index, candidate in enumerate(candidates)), reverse=True
        )
        below = (index for _, index in weights if candidates[index].load + 1 <= fair)
        return Choice(next(below), Reason.HASH)

    def placed(self, trail: Trail, memory: int) -> None:
        """An engine has taken a request: it will have its beginning in memory."""
        if self.policy is not Policy.PREFIX:
            return
        holders = self._holders
        for digest, chars in zip(trail.digests, trail.chars, strict=True):
            if chars < MIN_CHARS:
                continue
            known = holders.pop(digest, ())
            if not known or known[0] != memory:
                known = (memory, *(other for other in known if other != memory))[:MAX_HOLDERS]
            holders[digest] = known
        while len(holders) > self._max_prefixes:
            holders.popitem(last=False)

    def _known(self, trail: Trail, candidates: Sequence[Candidate], most: float) -> Choice | None:
        by_memory = {candidate.memory: index for index, candidate in enumerate(candidates)}
        for digest, chars in zip(reversed(trail.digests), reversed(trail.chars), strict=True):
            if chars < max(MIN_CHARS, MIN_SHARE * trail.num_chars):
                return None
            able = [
                by_memory[memory]
                for memory in self._holders.get(digest, ())
                if memory in by_memory and candidates[by_memory[memory]].load + 1 <= most
            ]
            if able:
                return Choice(min(able, key=lambda index: candidates[index].load), Reason.PREFIX, chars)
        return None

    def _least_loaded(self, candidates: Sequence[Candidate]) -> Choice:
        """Of equals, each in turn."""
        number = len(candidates)
        order = (index % number for index in range(self._turn, self._turn + number))
        return Choice(min(order, key=lambda index: candidates[index].load), Reason.LOAD)


def bound(candidates: Sequence[Candidate]) -> float:
    """The load that none may pass with one more request; the least loaded never does."""
    return math.ceil((1 + EPSILON) * (sum(candidate.load for candidate in candidates) + 1) / len(candidates))


def _weight(head: int, name: str) -> bytes:
    return blake2b(head.to_bytes(8, "little") + name.encode(), digest_size=8).digest()
