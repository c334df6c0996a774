"""Conversations with shared beginnings, on a real trace's arrival times and lengths.

The Azure LLM inference trace (2023, CC BY 4.0; Patel et al., ISCA 2024) has the arrival, prompt and output length of
each request, and no contents: which request continues which conversation is not in it. Here each request that can be a
further turn of an open conversation (its prompt has room for all that came before and a few words, and not more than
`MAX_TURN` besides) is one with probability `CONTINUES`, of the one that fits best; the others begin a conversation,
with one of `NUM_SYSTEMS` system prompts. That is an assumption, made once for all policies alike, with a seed.
"""

from __future__ import annotations

import bisect
import csv
import random
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

CONTINUES = 0.6
NUM_SYSTEMS = 8
SYSTEM_TOKENS = 160
MIN_TURN, MAX_TURN = 8, 512  # tokens of a user's turn
OPEN_S = 300.0  # between two turns


@dataclass(frozen=True, slots=True)
class Turn:
    """A request. `words` are what its new user message has; `prompt` and `output` are tokens; `at` is seconds."""

    at: float
    conversation: int
    index: int  # in its conversation
    system: int
    words: int
    prompt: int
    output: int


def read(file: Path, *, scale: float, max_prompt: int, max_output: int, number: int) -> list[Turn]:
    """The first `number` requests, lengths times `scale` and cut to what a model takes, in order of arrival."""
    draw = random.Random(0)
    turns: list[Turn] = []
    open_ones: list[tuple[int, float, int, int, int]] = []  # total tokens, last at, conversation, turns, system; sorted
    with file.open(newline="") as lines:
        begin = None
        for row in csv.DictReader(lines):
            now = datetime.fromisoformat(row["TIMESTAMP"][:26])
            begin = begin or now
            at = (now - begin).total_seconds()
            prompt = min(max_prompt, max(SYSTEM_TOKENS + MIN_TURN, int(int(row["ContextTokens"]) * scale)))
            output = min(max_output, max(1, int(int(row["GeneratedTokens"]) * scale)))
            open_ones = [each for each in open_ones if at - each[1] <= OPEN_S]
            place = bisect.bisect_right(open_ones, (prompt - MIN_TURN, float("inf"), 0, 0, 0)) - 1
            fits = place >= 0 and prompt - open_ones[place][0] <= MAX_TURN
            if fits and draw.random() < CONTINUES:
                total, _, conversation, index, system = open_ones.pop(place)
                turn = Turn(at, conversation, index, system, prompt - total, prompt, output)
            else:
                system = draw.randrange(NUM_SYSTEMS)
                turn = Turn(at, len(turns), 0, system, prompt - SYSTEM_TOKENS, prompt, output)
            turns.append(turn)
            bisect.insort(open_ones, (prompt + output, at, turn.conversation, turn.index + 1, turn.system))
            if len(turns) == number:
                break
    return turns


class Texts:
    """What the turns say: words drawn with a seed, so that equal turns are equal texts and others are not."""

    WORDS = ("cat", "boat", "moon", "king", "rain", "fox", "sea", "hill", "door", "lamp", "tree", "song", "road")

    def system(self, number: int, tokens: int = SYSTEM_TOKENS) -> str:
        return self._text(f"system {number}", tokens)

    def user(self, turn: Turn) -> str:
        return self._text(f"{turn.conversation} {turn.index}", turn.words)

    def reply(self, turn: Turn) -> str:
        return self._text(f"reply {turn.conversation} {turn.index}", turn.output)

    def _text(self, seed: str, words: int) -> str:
        draw = random.Random(seed)
        return f"{seed}: " + " ".join(draw.choices(self.WORDS, k=max(1, words - 3)))
