"""A grammar as an automaton over bytes with a stack of rule calls, and the shortest way from each state to its end.

Owns the states and what they cost to end. `document.py` walks in it. Grammars here have no left recursion: every call
reads a byte before it comes round to itself.

    state ──byte range──▶ state      ──nothing──▶ state      ──call of a rule, then──▶ state

A state's `cost` is the fewest bytes to the end of its own rule; what the callers still need comes on top. Costs are
Knuth's generalisation of Dijkstra's algorithm (1977), in which a call costs what its rule costs.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import msgspec

from aiexport_edge.engine.structured.expressions import (
    Alt,
    Call,
    Chars,
    Except,
    Expression,
    Grammar,
    Lexeme,
    Repeat,
    Seq,
    Text,
)
from aiexport_edge.engine.structured.utf8 import byte_ranges

UNREACHABLE = 1 << 60
# (states to come back to, outermost first; the state after the byte)
Move = tuple[tuple[int, ...], int]


class GrammarTooLarge(Exception):
    """There are more states than allowed."""


class NoDocument(Exception):
    """No document of this grammar ever ends."""


class Edges(msgspec.Struct, frozen=True, array_like=True):
    """Edges of some kind, those of one state after those of another: arrays of int32 as bytes, of `width` numbers each.
    Those of state s begin at `offsets[s]` and end at `offsets[s + 1]`.
    """

    width: int
    offsets: bytes
    numbers: bytes


class Columns(msgspec.Struct, frozen=True, array_like=True):
    """A whole automaton: what `Automaton.of` needs. `cost` is of int64, `best` of pairs of int32."""

    start: int
    is_end: bytes
    cost: bytes
    best: bytes
    texts: Edges  # low byte, high byte, target
    empty: Edges  # target
    calls: Edges  # start of a rule, state after it


class _Rows(Sequence[Sequence[tuple[int, ...]]]):
    """`Edges` as they are read: by state."""

    def __init__(self, edges: Edges) -> None:
        self._width = edges.width
        self._offsets = array("i", edges.offsets)
        self._numbers = array("i", edges.numbers)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, state: Any) -> Any:
        width = self._width
        numbers = iter(self._numbers[self._offsets[state] * width : self._offsets[state + 1] * width])
        return list(zip(*[numbers] * width, strict=True))


def _edges(width: int, rows: Sequence[Sequence[tuple[int, ...]]]) -> Edges:
    offsets = array("i", [0, *accumulate(map(len, rows))])
    numbers = array("i", chain.from_iterable(chain.from_iterable(rows)))
    return Edges(width, offsets.tobytes(), numbers.tobytes())


class Automaton:
    """The states of a grammar. Immutable but for what it remembers of answers already given."""

    def __init__(
        self,
        *,
        start: int,
        is_end: bytes,
        cost: Sequence[int],
        best: Sequence[tuple[int, ...]],
        texts: Sequence[Sequence[tuple[int, ...]]],
        empty: Sequence[Sequence[tuple[int, ...]]],
        calls: Sequence[Sequence[tuple[int, ...]]],
    ) -> None:
        self.start = start
        self.cost = cost
        self._is_end = is_end
        self._best = best
        self._bytes = texts  # low, high, target
        self._empty = empty  # target
        self._calls = calls  # start of a rule, state after it
        self._closures: dict[int, tuple[list[tuple[tuple[int, ...], int]], bool]] = {}
        self._moves: dict[int, tuple[Move, ...]] = {}
        self._tails: dict[int, bytes] = {}

    @staticmethod
    def build(grammar: Grammar, *, max_states: int) -> Automaton:
        """Of a grammar. Raises `GrammarTooLarge` past `max_states`, and `NoDocument`."""
        return _Builder(grammar, max_states).automaton()

    @staticmethod
    def of(columns: Columns) -> Automaton:
        """The inverse of `columns`."""
        best = iter(array("i", columns.best))
        return Automaton(
            start=columns.start,
            is_end=columns.is_end,
            cost=array("q", columns.cost),
            best=list(zip(best, best, strict=True)),
            texts=_Rows(columns.texts),
            empty=_Rows(columns.empty),
            calls=_Rows(columns.calls),
        )

    def columns(self) -> Columns:
        """All of it, to be sent to another process."""
        return Columns(
            start=self.start,
            is_end=bytes(self._is_end),
            cost=array("q", self.cost).tobytes(),
            best=array("i", chain.from_iterable(self._best)).tobytes(),
            texts=_edges(3, self._bytes),
            empty=_edges(1, self._empty),
            calls=_edges(2, self._calls),
        )

    @property
    def num_states(self) -> int:
        return len(self._bytes)

    def moves(self, state: int, byte: int) -> tuple[Move, ...]:
        """Where `byte` leads from `state` without leaving its rule."""
        key = state << 8 | byte
        moves = self._moves.get(key)
        if moves is None:
            found: dict[Move, None] = {}
            for pushes, here in self._closure(state)[0]:
                for low, high, target in self._bytes[here]:
                    if low <= byte <= high and self.cost[target] < UNREACHABLE:
                        found[(pushes, target)] = None
            moves = self._moves[key] = tuple(found)
        return moves

    def returns(self, state: int) -> bool:
        """Whether the rule may end here."""
        return self._closure(state)[1]

    def goes_on(self, state: int) -> bool:
        """Whether some byte leads on from here without leaving the rule."""
        return any(self._bytes[here] for _, here in self._closure(state)[0])

    def tail(self, state: int) -> bytes:
        """The shortest way from `state` to the end of its rule, `cost` bytes."""
        known = self._tails.get(state)
        if known is not None:
            return known
        out = bytearray()
        stack: list[int] = []
        here = state
        while True:
            if self._is_end[here]:
                if not stack:
                    break
                here = stack.pop()
                continue
            kind, index = self._best[here]
            if kind == 0:
                low, _, target = self._bytes[here][index]
                out.append(low)
                here = target
            elif kind == 1:
                (here,) = self._empty[here][index]
            else:
                here, after = self._calls[here][index]
                stack.append(after)
        tail = self._tails[state] = bytes(out)
        return tail

    def _closure(self, state: int) -> tuple[list[tuple[tuple[int, ...], int]], bool]:
        """States with bytes to read that `state` reaches by reading none, each with the states to come back to; and
        whether its rule may end before any byte."""
        known = self._closures.get(state)
        if known is not None:
            return known
        reading: list[tuple[tuple[int, ...], int]] = []
        may_end = False
        todo: list[tuple[tuple[int, ...], int]] = [((), state)]
        seen = set(todo)
        while todo:
            pushes, here = todo.pop()
            if self._bytes[here]:
                reading.append((pushes, here))
            ahead: list[tuple[tuple[int, ...], int]] = [(pushes, target) for (target,) in self._empty[here]]
            for start, after in self._calls[here]:
                # A call at a rule's very end comes back to nothing: no need to remember it.
                back = pushes if self._is_end[after] else (*pushes, after)
                ahead.append((back, start))
            if self._is_end[here]:
                if pushes:
                    ahead.append((pushes[:-1], pushes[-1]))
                else:
                    may_end = True
            for entry in ahead:
                if entry not in seen and self.cost[entry[1]] < UNREACHABLE:
                    seen.add(entry)
                    todo.append(entry)
        answer = self._closures[state] = (reading, may_end)
        return answer


class _Builder:
    """Makes the states of a grammar and finds what they cost to end."""

    def __init__(self, grammar: Grammar, max_states: int) -> None:
        self._max_states = max_states
        self._start = grammar.start
        self._bytes: list[list[tuple[int, int, int]]] = []  # low, high, target
        self._empty: list[list[int]] = []
        self._calls: list[list[tuple[str, int]]] = []  # rule, state after it
        self._starts: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        for name in grammar.rules:
            self._starts[name], self._ends[name] = self._state(), self._state()
        for name, expression in grammar.rules.items():
            self._build(expression, self._starts[name], self._ends[name])
        self._is_end = bytearray(len(self._bytes))
        for end in self._ends.values():
            self._is_end[end] = 1
        self._cost = [UNREACHABLE] * len(self._bytes)
        self._best = [(-1, -1)] * len(self._bytes)
        self._find_costs()

    def automaton(self) -> Automaton:
        """Raises `NoDocument`."""
        starts = self._starts
        start = starts[self._start]
        if self._cost[start] >= UNREACHABLE:
            raise NoDocument
        return Automaton(
            start=start,
            is_end=bytes(self._is_end),
            cost=self._cost,
            best=self._best,
            texts=self._bytes,
            empty=[[(target,) for target in targets] for targets in self._empty],
            calls=[[(starts[rule], after) for rule, after in calls] for calls in self._calls],
        )

    def _state(self) -> int:
        if len(self._bytes) >= self._max_states:
            raise GrammarTooLarge
        self._bytes.append([])
        self._empty.append([])
        self._calls.append([])
        return len(self._bytes) - 1

    def _build(self, expression: Expression, start: int, end: int) -> None:
        """Paths from `start` to `end` that spell `expression`. None leads back to `start` or away from `end`, so both
        may be shared."""
        match expression:
            case Text(text):
                data = text.encode()
                if not data:
                    self._empty[start].append(end)
                    return
                here = start
                for byte in data[:-1]:
                    after = self._state()
                    self._bytes[here].append((byte, byte, after))
                    here = after
                self._bytes[here].append((data[-1], data[-1], end))
            case Chars(ranges):
                beyond_ascii = tuple((max(low, 0x80), high) for low, high in ranges if high >= 0x80)
                self._bytes[start] += [(low, min(high, 0x7F), end) for low, high in ranges if low < 0x80]
                if beyond_ascii:
                    self._calls[start].append((self._wide_rule(beyond_ascii), end))
            case Seq(parts):
                here = start
                for part in parts[:-1]:
                    after = self._state()
                    self._build(part, here, after)
                    here = after
                if parts:
                    self._build(parts[-1], here, end)
                else:
                    self._empty[here].append(end)
            case Alt(options):
                for option in options:
                    self._build(option, start, end)
            case Repeat(part, least, most):
                self._repeat(part, least, most, start, end)
            case Call(rule):
                self._calls[start].append((rule, end))
            case Except(_, _, part) | Lexeme(part):
                self._build(part, start, end)

    def _wide_rule(self, ranges: tuple[tuple[int, int], ...]) -> str:
        """A rule of characters of several bytes, which take some thirty states: once for all their places."""
        name = f"wide {ranges}"
        if name not in self._starts:
            start, end = self._starts[name], self._ends[name] = self._state(), self._state()
            for low, high in ranges:
                for sequence in byte_ranges(low, high):
                    self._add_bytes(sequence, start, end)
        return name

    def _add_bytes(self, sequence: Sequence[tuple[int, int]], start: int, end: int) -> None:
        here = start
        for low, high in sequence[:-1]:
            after = self._state()
            self._bytes[here].append((low, high, after))
            here = after
        self._bytes[here].append((*sequence[-1], end))

    def _repeat(self, part: Expression, least: int, most: int | None, start: int, end: int) -> None:
        here = start
        for _ in range(least):
            after = self._state()
            self._build(part, here, after)
            here = after
        if most is None:
            loop = self._state()
            self._empty[here].append(loop)
            again = self._state()
            self._build(part, loop, again)
            self._empty[again].append(loop)
            self._empty[loop].append(end)
            return
        self._empty[here].append(end)
        for _ in range(most - least):
            after = self._state()
            self._build(part, here, after)
            self._empty[after].append(end)
            here = after

    def _find_costs(self) -> None:
        """Cost and best edge of every state, cheapest first."""
        into: list[list[tuple[int, int, int]]] = [[] for _ in self._bytes]  # (state, kind, index) that lead here
        callers: dict[str, list[tuple[int, int, int]]] = {name: [] for name in self._starts}
        for state in range(len(self._bytes)):
            for index, (_, _, target) in enumerate(self._bytes[state]):
                into[target].append((state, 0, index))
            for index, target in enumerate(self._empty[state]):
                into[target].append((state, 1, index))
            for index, (rule, after) in enumerate(self._calls[state]):
                into[after].append((state, 2, index))
                callers[rule].append((state, index, after))
        rule_at = {start: rule for rule, start in self._starts.items()}
        heap = [(0, state, -1, -1) for state in range(len(self._bytes)) if self._is_end[state]]
        while heap:
            cost, state, kind, index = heapq.heappop(heap)
            if self._cost[state] < UNREACHABLE:
                continue
            self._cost[state], self._best[state] = cost, (kind, index)
            for source, how, edge in into[state]:
                if self._cost[source] == UNREACHABLE:
                    more = 1 if how == 0 else 0 if how == 1 else self._cost[self._starts[self._calls[source][edge][0]]]
                    if more < UNREACHABLE:
                        heapq.heappush(heap, (cost + more, source, how, edge))
            for source, edge, after in callers.get(rule_at.get(state, ""), ()):
                if self._cost[source] == UNREACHABLE and self._cost[after] < UNREACHABLE:
                    heapq.heappush(heap, (cost + self._cost[after], source, 2, edge))
