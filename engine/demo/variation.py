"""Small text tools that the generators share: alternation grammar and the ways people type."""

# ruff: noqa: SIM905

from __future__ import annotations

import random
import re
import string
from typing import TypedDict


class Message(TypedDict):
    """One message of a conversation, as the chat template takes it."""

    role: str
    content: str


Turn = tuple[str, str]
"""What the user says, what the model answers."""

_CHOICE = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"\$([a-z_0-9]+)")


def expand(rng: random.Random, pattern: str, **slots: str) -> str:
    """Choose one of each ``{a|b}`` (nested ones from the inside), then fill each ``$slot``."""
    while True:
        pattern, n = _CHOICE.subn(lambda m: rng.choice(m.group(1).split("|")), pattern)
        if not n:
            break
    return _SLOT.sub(lambda m: slots.get(m.group(1), m.group(0)), pattern)


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


_ONSETS = "b c d f g h j k l m n p r s t v w z br cr dr fl gl kr pl st tr sh ch th qu".split()
_VOWELS = "a e i o u a e i o u ai ee oo ou ia".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "k", "nd", "x", "sh"]


def invented(rng: random.Random) -> str:
    """A word nobody has heard of, so that the model learns to copy and not only to recall."""
    return "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(rng.choice([1, 2, 2, 3]))
    )


def _typo(rng: random.Random, text: str) -> str:
    if len(text) < 4:
        return text
    at = rng.randrange(1, len(text) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return text[:at] + text[at + 1 :]
    if kind == 1:
        return text[:at] + text[at] + text[at:]
    if kind == 2:
        return text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]
    return text[:at] + rng.choice(string.ascii_lowercase) + text[at + 1 :]


def typed(rng: random.Random, text: str, *, exact: bool = False) -> str:
    """The text as somebody might type it: lower case, no full stop, a slip, a greeting before it.

    ``exact`` keeps letters as they are, for requests whose letters the answer must repeat.
    """
    if not exact:
        if rng.random() < 0.3:
            text = text.lower()
        if rng.random() < 0.07:
            text = _typo(rng, text)
        if rng.random() < 0.01:
            text = text.upper()
    if rng.random() < 0.28:
        text = text.rstrip(".?! ") or text
    elif rng.random() < 0.06:
        text = text.rstrip(".?! ") + rng.choice(["!", "??", "...", " ?", ".", "!!"])
    if rng.random() < 0.07:
        first = text[:1].lower() if not text.startswith(("I ", "I'")) and not text[:2].isupper() else text[:1]
        text = (
            rng.choice(["Hi, ", "Hey, ", "Hello, ", "ok, ", "Okay, ", "So, ", "Well, ", "please, "]) + first + text[1:]
        )
    if rng.random() < 0.02:
        text = rng.choice([text + "\n", " " + text, text + " "])
    return text
