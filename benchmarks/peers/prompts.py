"""Prompts of an exact number of tokens, template included; each differs from the first word on, or after a shared part.

Owns the words. Counting is transformers', whose tokenizer and template all servers follow.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

Count = Callable[[str], int]

CANDIDATES = ("the", "a", "to", "and", "of", "in", "is", "it", "you", "that", "was", "for", "on", "are", "with", "as")


def make_counter(directory: Path) -> Count:
    """How many tokens a conversation of one user message has."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)

    def count(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        return len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    return count


def find_words(count: Count) -> list[str]:
    """Words that are one token each after a space, whatever comes before."""
    base = count("x")
    return [word for word in CANDIDATES if count(f"x {word} {word}") == base + 2]


class Prompts:
    """A deterministic series of prompts: the same for every server."""

    def __init__(self, count: Count, *, seed: int) -> None:
        self._count = count
        self._words = find_words(count)
        self._random = random.Random(seed)

    def text(self, num_tokens: int, *, begin: str = "") -> str:
        """A message that makes a prompt of `num_tokens`, beginning with `begin`, which ends at a word's end."""
        have = self._count(begin) if begin else self._count("x")
        words = [begin] if begin else ["x"]
        words += self._random.choices(self._words, k=num_tokens - have)
        text = " ".join(words)
        assert self._count(text) == num_tokens
        return text

    def shared_part(self, num_tokens: int) -> str:
        """What `num_tokens` tokens at the beginning of several prompts have in common."""
        return self.text(num_tokens)
