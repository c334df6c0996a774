"""Requests to say something back, letter for letter, and a few small tricks: counting and lists."""

# ruff: noqa: E501

from __future__ import annotations

import random

from . import words
from .variation import Turn, expand, invented, sentence, typed


def phrase(rng: random.Random, quotes: list[str] | None = None) -> str:
    """A word or a short sentence to repeat, some of them from ``quotes``."""
    r = rng.random()
    if quotes and r > 0.75:
        quote = rng.choice(quotes).split()
        first = rng.randrange(len(quote))
        return " ".join(quote[first : first + rng.randint(1, 9)])
    if r < 0.3:
        word = rng.choice(words.PLAIN)
        return sentence(word) if rng.random() < 0.4 else word.upper() if rng.random() < 0.1 else word
    if r < 0.45:
        return invented(rng)
    if r < 0.55:
        return " ".join(rng.choice(words.PLAIN) for _ in range(rng.randint(2, 5)))
    if r < 0.62:
        return str(rng.randint(0, 10 ** rng.randint(1, 6)))
    if r < 0.66:
        return f"{invented(rng)} {invented(rng)}"
    return plain_sentence(rng)


def plain_sentence(rng: random.Random) -> str:
    """A simple sentence."""
    text = f"{rng.choice(words.SUBJECTS)} {rng.choice(words.VERBS)} {rng.choice(words.THINGS)}{rng.choice(words.TAILS)}"
    return sentence(text) + rng.choice([".", ".", ".", "", "!"])


_ASK = [
    "Repeat after me: $x", "Repeat after me: $x", "Repeat: $x", "Repeat this: $x", "Please repeat: $x", "Repeat the word $x", 'Say "$x"',
    "Say $x", "Say: $x", "Just say $x", "Echo: $x", "echo $x", "Repeat the {sentence|text|words}: $x", 'Repeat "$x"', "Can you say $x",
    "Repeat {back |}to me: $x", "Say the word $x", 'Reply with "$x"', "Reply with exactly: $x", "Reply with only: $x", "Answer with just: $x",
    "Reply with the word $x", "Say exactly this: $x", "Write: $x", "Write this back to me: $x", "Respond with: $x", "Respond with only the word $x",
    "Say '$x'", "Say only: $x", "{Output|Print|Return|Type}: $x", "Repeat exactly: $x", "Say it after me: $x", "Copy this: $x",
]  # fmt: skip


def echo(rng: random.Random, quotes: list[str] | None = None) -> Turn:
    """Something to repeat, and the same."""
    x = phrase(rng, quotes)
    question = expand(rng, rng.choice(_ASK)).replace("$x", x)
    if rng.random() < 0.15:
        question = question[:1].lower() + question[1:]
    return question, x


_LISTS = {
    "fruits": words.FRUITS, "animals": words.ANIMALS[:30], "colors": words.COLORS, "vegetables": words.VEGETABLES,
    "cities": list(words.CITIES), "countries": list(dict.fromkeys(words.CITIES.values())), "names": words.SHE[:15] + words.HE[:15],
}  # fmt: skip
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]


def trick(rng: random.Random) -> Turn:
    """Counting, a list, the days, the alphabet."""
    r = rng.random()
    if r < 0.55:
        first = 1 if rng.random() < 0.85 else rng.randint(2, 20)
        last = first + rng.choice([2, 3, 4, 4, 5, 6, 7, 8, 9, 9, 9, 9, 11, 14, 19])
        question = f"{rng.choice(['Count', 'Please count', 'Can you count', 'count'])} "
        question += f"to {last}" if first == 1 and rng.random() < 0.5 else f"from {first} to {last}"
        return typed(rng, question + "."), ", ".join(str(i) for i in range(first, last + 1))
    if r < 0.8:
        kind, n = rng.choice(list(_LISTS)), rng.randint(2, 5)
        number = str(n) if rng.random() < 0.5 else _NUMBERS[n]
        question = expand(rng, "{List|Name|Give me|Tell me|Write} $n $kind.", n=number, kind=kind)
        return typed(rng, question), ", ".join(rng.sample(_LISTS[kind], n))
    if r < 0.88:
        return typed(
            rng, rng.choice(["What are the days of the week?", "List the days of the week.", "Name the seven days"])
        ), ", ".join(words.DAYS)
    if r < 0.93:
        return typed(
            rng, rng.choice(["What are the months of the year?", "List the months.", "Name the months of the year"])
        ), ", ".join(words.MONTHS)
    question = rng.choice(
        ["Say the alphabet.", "Write the alphabet.", "What is the alphabet?", "List the letters of the alphabet."]
    )
    return typed(rng, question), "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"


def conversation(rng: random.Random, quotes: list[str] | None = None) -> list[Turn]:
    """One to three things to say back."""
    turns = [echo(rng, quotes) if rng.random() < 0.7 else trick(rng)]
    while rng.random() < 0.2 and len(turns) < 3:
        turns.append(echo(rng, quotes))
    return turns
