"""The mixture of conversations that the demo model is trained on, and how they are packed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

from . import arithmetic, conversations, echoes, stories, structured
from .variation import Message, Turn, expand

SENTENCE = re.compile(r"[^.!?]+[.!?]")


def quotes_from(folder: Path | None) -> list[str]:
    """Sentences of public-domain books (``*.txt``) that stand for what people paste; none without a folder."""
    found: list[str] = []
    for path in sorted(folder.glob("*.txt")) if folder else []:
        text = re.sub(r"\s+", " ", path.read_text("utf-8", "replace"))
        for match in SENTENCE.finditer(text):
            line = match.group(0).strip()
            if 15 < len(line) < 120 and "_" not in line and "Gutenberg" not in line:
                found.append(line)
    return found


def segment(rng: random.Random, quotes: list[str]) -> list[Turn]:
    """Some turns about one of the things that the model knows."""
    r = rng.random()
    if r < 0.23:
        return conversations.conversation(rng, quotes)
    if r < 0.26:
        return conversations.own_name(rng)
    if r < 0.265:
        return [conversations.nameless(rng)]
    if r < 0.47:
        return arithmetic.conversation(rng)
    if r < 0.64:
        return structured.conversation(rng)
    if r < 0.88:
        return echoes.conversation(rng, quotes)
    return stories.conversation(rng)


def conversation(rng: random.Random, quotes: list[str], *, long: bool = False) -> list[Message]:
    """One conversation: perhaps a system prompt, then turns. ``long`` ones have many turns or a pasted text."""
    system = ""
    r = rng.random()
    if r < 0.02:
        system, turns = conversations.named_by_system(rng)
    elif r < 0.035:
        plain = [arithmetic.addition(rng)] if rng.random() < 0.4 else conversations.conversation(rng, quotes)[:2]
        system, turns = structured.by_system(rng, plain)
    else:
        if r < 0.24:
            system = expand(rng, rng.choice(conversations.SYSTEM))
            if rng.random() < 0.15:
                system += " " + expand(rng, rng.choice(conversations.SYSTEM))
        turns = segment(rng, quotes)
    more = rng.choice([3, 6, 10, 16]) if long else 0 if rng.random() < 0.72 else rng.choice([1, 1, 2])
    if r < 0.035:
        return _messages(system, turns)
    if long and rng.random() < 0.45:
        more = 0
        user, answer = turns[-1]
        text = conversations.filler(rng, quotes, rng.choice([60, 150, 300, 500, 800]))
        if rng.random() < 0.25:
            system = text
        elif rng.random() < 0.5:
            turns = [(text, conversations.UNKNOWN_ANSWERS[0])]
        else:
            turns = [(f"{text}\n\n{user}", answer)]
    for _ in range(more):
        turns.extend(segment(rng, quotes))
    return _messages(system, turns)


def _messages(system: str, turns: list[Turn]) -> list[Message]:
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": system})
    for user, answer in turns:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": answer})
    return messages


def stream(seed: int, quotes: list[str], *, long_share: float = 0.0, sums: float = 0.0) -> Iterator[list[Message]]:
    """Conversations without end, the same for the same seed; a share ``sums`` of them only adds."""
    rng = random.Random(seed)
    while True:
        if sums and rng.random() < sums:
            yield _messages("", arithmetic.conversation(rng))
            continue
        yield conversation(rng, quotes, long=rng.random() < long_share)
