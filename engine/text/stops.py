"""Finds a request's stop sequences in its text. Owns the text that may yet turn out to be the beginning of one.

The reply ends at the first character at which its text ends with a stop sequence; if two end there, the longer counts.
So the outcome depends on the text alone, not on how tokens cut it. What is returned never contains any part of the
sequence found, and text is held back only while it is the beginning of some stop sequence.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """A Knuth-Morris-Pratt automaton for each stop sequence, all fed the same characters. Empty sequences never
    match.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)  # how many characters of each the text ends with
        self._first = frozenset(stop[0] for stop in self._stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Text that is certain now, and the stop sequence found, after which nothing may be fed any more."""
        if not self._held and self._first.isdisjoint(text):
            return text, None
        buffer = self._held + text
        states = self._states
        for position, character in enumerate(text, start=len(self._held)):
            for index, stop in enumerate(self._stops):
                state, failure = states[index], self._failures[index]
                while state and stop[state] != character:
                    state = failure[state]
                state += stop[state] == character
                if state == len(stop):
                    self._held = ""
                    return buffer[: position + 1 - len(stop)], stop
                states[index] = state
        certain = len(buffer) - max(states)
        self._held = buffer[certain:]
        return buffer[:certain], None

    def flush(self) -> str:
        """What was held back: the reply has ended, so no stop sequence can complete any more."""
        held, self._held = self._held, ""
        return held


def _failure_function(pattern: str) -> list[int]:
    """failure[n]: length of the longest proper prefix of pattern[:n] that is also its suffix."""
    failure = [0] * (len(pattern) + 1)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[length] != pattern[index]:
            length = failure[length]
        length += pattern[length] == pattern[index]
        failure[index + 1] = length
    return failure
