"""A document while it is written: which continuations its grammar has, and the shortest that ends it.

Owns the positions in the automaton, several where a text can be read in more than one way. Positions are values: to try
some bytes costs nothing but the trying.
"""

from __future__ import annotations

from collections.abc import Iterable

from aiexport_edge.engine.structured.automaton import Automaton

MAX_DEPTH = 64  # of rule calls, so of nested arrays and objects too: every common JSON parser reads as much
MAX_READINGS = 1024  # positions kept at once, those that are soonest at an end


class Frame:
    """A rule that is to be gone on with, at `state`, when the one that it called has ended. Equal ones are one."""

    __slots__ = ("_above", "below", "cost", "depth", "state")

    def __init__(self, state: int, below: Frame | None, cost: int) -> None:
        self.state = state
        self.below = below
        self.cost = cost  # fewest bytes from here to the end of the document
        self.depth: int = 1 if below is None else below.depth + 1
        self._above: dict[int, Frame] = {}

    def above(self, state: int, cost: int) -> Frame:
        """The frame of `state` on top of this one; `cost` is what `state` alone needs to its end."""
        frame = self._above.get(state)
        if frame is None:
            frame = self._above[state] = Frame(state, self, cost + self.cost)
        return frame


Position = tuple[int, Frame]
Positions = tuple[Position, ...]


class Reader:
    """Walks one document through an automaton."""

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton
        self._ground = Frame(-1, None, 0)
        self.beginning: Positions = ((automaton.start, self._ground),)

    def read(self, positions: Positions, data: Iterable[int]) -> Positions:
        """Where the bytes lead; empty where they cannot follow."""
        moves, returns, cost = self.automaton.moves, self.automaton.returns, self.automaton.cost
        for byte in data:
            ahead: dict[Position, None] = {}
            for state, frame in positions:
                while True:
                    for pushes, target in moves(state, byte):
                        top = frame
                        for push in pushes:
                            top = top.above(push, cost[push])
                        ahead[(target, top)] = None
                    if frame.below is None or not returns(state):
                        break
                    state, frame = frame.state, frame.below
            if not ahead:
                return ()
            positions = tuple(ahead)
            if len(positions) > MAX_READINGS:
                positions = tuple(sorted(positions, key=self._cost)[:MAX_READINGS])
        return positions

    def within_depth(self, positions: Positions) -> Positions:
        """Those that are nested no deeper than allowed."""
        return tuple(position for position in positions if position[1].depth <= MAX_DEPTH)

    def num_bytes_left(self, positions: Positions) -> int:
        """Length of `ending`; 0 where the document may end here."""
        return min(map(self._cost, positions))

    def ending(self, positions: Positions) -> bytes:
        """The shortest text that completes the document, in bytes."""
        return b"".join(map(self.tail, self.states_to_end(positions)))

    def states_to_end(self, positions: Positions) -> list[int]:
        """The states whose tails, one after the other, are `ending`."""
        state, frame = min(positions, key=self._cost)
        states = [state]
        while frame.below is not None:
            states.append(frame.state)
            frame = frame.below
        return states

    def tail(self, state: int) -> bytes:
        """See `Automaton.tail`."""
        return self.automaton.tail(state)

    def is_over(self, positions: Positions) -> bool:
        """Whether the document has ended: no byte can follow."""
        automaton = self.automaton
        for state, frame in positions:
            while True:
                if automaton.goes_on(state):
                    return False
                if frame.below is None or not automaton.returns(state):
                    break
                state, frame = frame.state, frame.below
        return True

    def _cost(self, position: Position) -> int:
        return self.automaton.cost[position[0]] + position[1].cost
