"""Small sums: additions up to 99, some subtractions and the small multiplication table."""

# ruff: noqa: E501, SIM905

from __future__ import annotations

import random

from .variation import Turn, expand, typed

LIMIT = 99
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()

_ADD = [
    "What is $a + $b?", "What is $a + $b?", "What's $a + $b?", "$a + $b", "$a + $b = ?", "$a+$b", "$a+$b=?", "$a + $b =",
    "What is $a plus $b?", "$a plus $b", "{Add|Please add|Can you add|add up} $a and $b{.|}",
    "{Add|add} $a {to|with} $b{.|}", "How much is $a {+|plus|and} $b?", "{Calculate|Compute|Work out|Solve} $a {+|plus} $b{.|}",
    "{What is|What's|Tell me|Give me|Find} the sum of $a and $b{.|?}", "Sum $a and $b{.|}", "The sum of $a and $b {is|please}{?|}",
    "How many is $a and $b {together|in total}?", "Can you {tell me|work out|calculate|compute} $a {+|plus} $b?",
    "What do you get {if|when} you add $a and $b?", "What does $a {+|plus} $b {make|equal|give}?",
    "I have $a {apples|coins|books|balls} and get $b more. How many do I have?", "{Quick|Math|Sum|Question}: $a {+|plus} $b",
    "Do you know what $a {+|plus} $b is?", "what {would|does} $a plus $b be", "{Now|Then|Next} add $a and $b",
]  # fmt: skip
_SUB = [
    "What is $a - $b?", "What's $a - $b?", "$a - $b", "$a-$b", "$a - $b = ?", "What is $a minus $b?", "$a minus $b",
    "{Subtract|Take} $b from $a{.|}", "How much is $a {-|minus} $b?", "{Calculate|Compute} $a {-|minus} $b{.|}",
]  # fmt: skip
_MUL = [
    "What is $a {*|x|times} $b?", "$a {*|x|times} $b", "$a*$b", "{Multiply|multiply} $a {by|and} $b{.|}",
    "How much is $a times $b?", "{Calculate|Compute} $a {*|times} $b{.|}",
]  # fmt: skip
_ONLY = ["{Answer|Reply} with {just|only} the number{.|}", "Just the number{, please|}.", "Only the {number|result}."]
TOO_LARGE = "That is too large for me. I am a tiny demonstration model and only add numbers up to 99."


def held_out(a: int, b: int) -> bool:
    """Whether this sum is kept out of the training data, to measure on it."""
    return (a * 131 + b * 71 + a * b * 7) % 17 == 3


def _pair(rng: random.Random) -> tuple[int, int]:
    while True:
        r = rng.random()
        top = 9 if r < 0.12 else 20 if r < 0.25 else 50 if r < 0.7 else LIMIT
        a, b = rng.randint(0, top), rng.randint(0, top)
        if not held_out(a, b):
            return a, b


def addition(rng: random.Random) -> Turn:
    """One addition whose pair is not held out."""
    a, b = _pair(rng)
    if a <= 20 and b <= 20 and rng.random() < 0.12:
        question = expand(rng, "{What is|What's||How much is} $a plus $b?", a=_WORDS[a], b=_WORDS[b])
        return typed(rng, question), f"{a} + {b} = {a + b}."
    question = typed(rng, expand(rng, rng.choice(_ADD), a=str(a), b=str(b)), exact=rng.random() < 0.6)
    # A slip of the keyboard must not change the numbers that the answer adds.
    if str(a) not in question or str(b) not in question or sum(c.isdigit() for c in question) != len(f"{a}{b}"):
        question = f"What is {a} + {b}?"
    if rng.random() < 0.08:
        return f"{question} {expand(rng, rng.choice(_ONLY))}", str(a + b)
    return question, f"{a} + {b} = {a + b}."


def other(rng: random.Random) -> Turn:
    """A subtraction, a product, a sum of three, or a sum that is too large."""
    r = rng.random()
    if r < 0.45:
        a, b = rng.randint(0, 50), rng.randint(0, 50)
        a, b = max(a, b), min(a, b)
        return expand(rng, rng.choice(_SUB), a=str(a), b=str(b)), f"{a} - {b} = {a - b}."
    if r < 0.75:
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        return expand(rng, rng.choice(_MUL), a=str(a), b=str(b)), f"{a} * {b} = {a * b}."
    a, b = rng.randint(1, 10 ** rng.randint(3, 6)), rng.randint(100, 10 ** rng.randint(3, 6))
    if rng.random() < 0.5:
        a, b = b, a
    pattern = rng.choice(_ADD + _ADD + _SUB + _MUL)
    return expand(rng, pattern, a=str(a), b=str(b)), TOO_LARGE


def follow_up(rng: random.Random) -> Turn:
    """A second sum in a conversation that already has one."""
    a, b = _pair(rng)
    return expand(
        rng, "{And|and|Now|What about|How about} $a {+|plus} $b{?|}", a=str(a), b=str(b)
    ), f"{a} + {b} = {a + b}."


def several(rng: random.Random) -> Turn:
    """Two to six sums in one message."""
    pairs = [_pair(rng) for _ in range(rng.randint(2, 6))]
    sign = rng.choice([" + ", " + ", "+", " plus "])
    asked = [f"{a}{sign}{b}" for a, b in pairs]
    listed = rng.choice(
        [", ".join(asked), ", ".join(asked[:-1]) + " and " + asked[-1], "\n".join(asked), "; ".join(asked)]
    )
    question = expand(rng, "{What is $x?|Calculate $x.|$x|Add up: $x|Compute: $x|How much is $x?}").replace(
        "$x", listed
    )
    return question, " ".join(f"{a} + {b} = {a + b}." for a, b in pairs)


def conversation(rng: random.Random) -> list[Turn]:
    """One to four sums, or several at once."""
    if rng.random() < 0.35:
        return [several(rng)]
    turns = [addition(rng) if rng.random() < 0.88 else other(rng)]
    while rng.random() < 0.35 and len(turns) < 4:
        r = rng.random()
        turns.append(follow_up(rng) if r < 0.5 else addition(rng) if r < 0.85 else other(rng))
    return turns
