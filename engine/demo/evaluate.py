"""Measure the demo model: sums, JSON, talk about the product, stories, repeating and honesty.

``python -m aiexport_edge.engine.demo.evaluate`` measures the committed model, greedily and at temperature 1.0, with
questions that are not in the training data, and prints a table or, with ``--json``, an object.
"""

# ruff: noqa: E501

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from . import MODEL_DIR, arithmetic, stories
from .variation import Message

Check = Callable[[str], bool]
Case = tuple[list[Message], Check]


def _says(*patterns: str) -> Check:
    return lambda answer: all(re.search(p, answer, re.IGNORECASE) for p in patterns)


PRODUCT: list[tuple[str, Check]] = [
    ("so what exactly are you then?", _says("demo")),
    ("Could you say a few words about yourself?", _says("demo")),
    ("Hey, who is it that I'm chatting with?", _says("demo")),
    ("Which team built you?", _says("AI Export Edge")),
    ("who was it that created you?", _says("AI Export Edge")),
    ("By whom were you trained?", _says("AI Export Edge")),
    ("What sort of things can you help me with?", _says("add small numbers")),
    ("Which things can you do?", _says("add small numbers")),
    ("Please list your abilities", _says("add small numbers")),
    ("Can you describe what AI Export Edge is?", _says("REST API|own machine")),
    ("What would I use AI Export Edge for?", _says("REST API|own machine")),
    ("How would I serve a real model with this?", _says(r"\[\[models\]\]")),
    ("I want to use a bigger model, how?", _says(r"\[\[models\]\]")),
    ("How can I swap you for a Hugging Face model?", _says(r"\[\[models\]\]")),
    ("How would one configure a better model?", _says(r"\[\[models\]\]")),
    ("How do I make a new API key?", _says("keys create")),
    ("Where can I get an API key?", _says("keys create")),
    ("I want to create a key for my workspace", _says("keys create")),
    ("How can I start up the server?", _says("serve")),
    ("What's the command for starting the server?", _says("serve")),
    ("Which port is the server listening on?", _says("8400")),
    ("what port should I connect to?", _says("8400")),
    ("How can I stream the answer?", _says("/v2/messages/stream")),
    ("Is it possible to stream responses?", _says("/v2/messages/stream")),
    ("What tiers do you offer?", _says("opus", "sonnet", "haiku")),
    ("Tell me about opus, sonnet and haiku", _says("opus", "sonnet", "haiku")),
    ("How can I check that my machine is fine?", _says("doctor")),
    ("what is the doctor command good for?", _says("doctor")),
    ("Under which license are you released?", _says("Apache")),
    ("Do you send my data to the cloud?", _says("own machine")),
    ("Hello there, nice to meet you!", _says("hello|nice|help")),
    ("hi, how are you doing today?", _says("fine")),
    ("Thanks so much for the help!", _says("welcome")),
    ("Goodbye and good night", _says("bye")),
]
"""Ways of asking that the training data do not contain, and what a right answer says."""

UNKNOWN = [
    "Who painted the Mona Lisa?", "What is the boiling point of water?", "Explain how a jet engine works.", "Who was the first man on the moon?",
    "Write a Haskell function that merges two trees.", "What is the airspeed of a swallow?", "Which country has the most lakes?",
    "Tell me the plot of Hamlet.", "How do airplanes stay in the air?", "What is the chemical formula of salt?", "When did the Titanic sink?",
    "Recommend me a good restaurant in Naples.", "Translate 'I am hungry' to Portuguese.", "What causes earthquakes?", "How many bones does a human have?",
    "flurb snaggle wop", "The committee adjourned without reaching a decision.", "Why did the dinosaurs die out?", "What is the GDP of Belgium?",
    "Can you review my contract?",
]  # fmt: skip
"""Questions whose only right answer is that the model does not know."""

JSON_KEYS = [
    ("Reply in JSON with name and age of a cat", ["name", "age"]),
    ("Give me a JSON object with keys city and country.", ["city", "country"]),
    ("I'd like a JSON object that has a name, a color and a price.", ["name", "color", "price"]),
    ("Respond in JSON with the fields title, author, year for a book.", ["title", "author", "year"]),
    ("Could you produce JSON with email and phone of a customer?", ["email", "phone"]),
    ("JSON please: first_name, last_name, age", ["first_name", "last_name", "age"]),
    ("Answer as a JSON object having the keys animal and sound.", ["animal", "sound"]),
    ("Return JSON with keys day, month and weather", ["day", "month", "weather"]),
    ("Describe a bicycle in JSON with the keys brand, color and speed.", ["brand", "color", "speed"]),
    ("Make me a JSON object with id, status and message.", ["id", "status", "message"]),
]
ECHO = [
    "blue elephant", "Zanzibar", "the soup is hot", "My dog sees two apples.", "pong", "I like trains", "wobbletron", "12345", "Good morning, friend", "xylophone",
]  # fmt: skip
HEROES = [
    ("a fox named Ruby", "Ruby"), ("a walrus named Boris", "Boris"), ("a princess called Amelia", "Amelia"), ("a dragon", "dragon"),
    ("a snail and a lantern", "lantern"), ("a robot who finds a key", "key"), ("a yak named Gromble", "Gromble"), ("a kitten", "kitten"),
    ("an owl in a lighthouse", "lighthouse"), ("a pirate on an island", "island"),
]  # fmt: skip


def _user(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _object(keys: list[str]) -> Check:
    def check(answer: str) -> bool:
        try:
            value = json.loads(answer)
        except ValueError:
            return False
        return isinstance(value, dict) and list(value) == keys

    return check


def _story(word: str) -> Check:
    return lambda answer: answer.endswith(stories.ENDING) and word in answer and len(answer.split()) > 50


def cases(sums: int = 100) -> dict[str, list[Case]]:
    """What is measured."""
    rng = random.Random(99)
    pairs = [(a, b) for a in range(100) for b in range(100) if arithmetic.held_out(a, b)]
    small = [p for p in pairs if max(p) <= 50]
    wordings = ["What is {} + {}?", "{} plus {}", "add {} and {}", "How much is {} + {}?"]

    def sum_case(a: int, b: int) -> Case:
        return _user(rng.choice(wordings).format(a, b)), lambda answer: re.findall(r"\d+", answer)[-1:] == [str(a + b)]

    def sum_cases(chosen: list[tuple[int, int]]) -> list[Case]:
        return [sum_case(a, b) for a, b in rng.sample(chosen, min(sums, len(chosen)))]

    def echo_case(text: str) -> Case:
        return _user(f"Repeat after me: {text}"), lambda answer: answer == text

    talk: list[Case] = [
        ([*_user("My name is Kira."), {"role": "assistant", "content": "Nice to meet you, Kira! How can I help you?"},
          *_user("Which port does it use?"), {"role": "assistant", "content": "The server listens on port 8400."}, *_user("What is my name?")], _says("Kira")),
        ([*_user("What is 3 + 4?"), {"role": "assistant", "content": "3 + 4 = 7."}, *_user("And 5 + 6?")], _says("11")),
        ([{"role": "system", "content": "Your name is Nelly."}, *_user("What's your name?")], _says("Nelly")),
        ([{"role": "system", "content": "You are a helpful assistant."}, *_user("Hello!"), {"role": "assistant", "content": "Hello! I am the demo model of AI Export Edge. How can I help you?"},
          *_user("How do I start the server?")], _says("serve")),
        ([{"role": "system", "content": "You are a helpful assistant that answers briefly and politely."}, *_user("What is 12 + 9?")], _says("21")),
        ([*_user("Tell me a joke"), {"role": "assistant", "content": "Why did the computer go to the doctor? It had a virus!"}, *_user("haha, thanks")], _says("welcome|good")),
    ]  # fmt: skip
    return {
        "sums to 50, unseen pairs": sum_cases(small),
        "sums to 99, unseen pairs": sum_cases([p for p in pairs if max(p) > 50]),
        "product and small talk": [(_user(q), c) for q, c in PRODUCT],
        "several turns, system prompt": talk,
        "JSON with the keys asked for": [(_user(q), _object(keys)) for q, keys in JSON_KEYS],
        "story with what was named, ended": [(_user(f"Tell me a story about {h}."), _story(w)) for h, w in HEROES],
        "repeats": [echo_case(x) for x in ECHO],
        "says that it does not know": [
            (_user(q), _says("tiny demonstration model|do not know|only speak")) for q in UNKNOWN
        ],
    }


class Model:
    """The model behind ``transformers``."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        (architecture,) = json.loads((path / "config.json").read_text())["architectures"]
        self.model: Any = getattr(transformers, architecture).from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, conversations: list[list[Message]], temperature: float, limit: int = 320) -> list[str]:
        """One answer to each, in batches."""
        answers: list[str] = []
        self.tokenizer.padding_side = "left"
        for at in range(0, len(conversations), 128):
            texts = [
                self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
                for c in conversations[at : at + 128]
            ]
            batch = self.tokenizer(texts, return_tensors="pt", padding=True)
            sampling = (
                {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
                if temperature
                else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            )
            out = self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=limit, **sampling
            )
            answers += self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers


def measure(
    path: Path = MODEL_DIR, sums: int = 100, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """For each kind the number of cases and the share of right answers, and the wrong answers."""
    model = Model(path)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    table: dict[str, dict[str, Any]] = {}
    wrong: list[dict[str, Any]] = []
    for kind, some in cases(sums).items():
        row: dict[str, Any] = {"cases": len(some)}
        for label, temperature, times in (("greedy", 0.0, 1), ("temperature 1.0", 1.0, 3)):
            torch.manual_seed(seed)
            repeated = some * times
            limit = 320 if kind.startswith("story") else 24 if kind.startswith(("sum", "repeat")) else 100
            answers = model.answer([c for c, _ in repeated], temperature, limit)
            right = [check(a) for a, (_, check) in zip(answers, repeated, strict=True)]
            row[label] = sum(right) / len(right)
            wrong += [
                {"kind": kind, "sampling": label, "asked": c[-1]["content"], "answered": a}
                for a, (c, _), ok in zip(answers, repeated, right, strict=True)
                if not ok
            ]
        table[kind] = row
    return table, wrong


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wrong", action="store_true", help="show the wrong answers as well")
    parser.add_argument("--sums", type=int, default=100)
    parser.add_argument("--ask", help="only answer this, greedily and thrice at temperature 1.0")
    args = parser.parse_args()
    if args.ask:
        model = Model(args.model)
        print("\n---\n".join(model.answer([_user(args.ask)], 0.0) + model.answer([_user(args.ask)] * 3, 1.0)))
        return
    began = time.monotonic()
    table, wrong = measure(args.model, args.sums)
    if args.json:
        print(
            json.dumps(
                {
                    "table": table,
                    "wrong": wrong if args.wrong else len(wrong),
                    "seconds": round(time.monotonic() - began),
                },
                indent=2,
            )
        )
        return
    print(f"{'':36} {'cases':>6} {'greedy':>8} {'temperature 1.0':>16}")
    for kind, row in table.items():
        print(f"{kind:36} {row['cases']:>6} {row['greedy']:>8.1%} {row['temperature 1.0']:>16.1%}")
    if args.wrong:
        for one in wrong:
            print(json.dumps(one, ensure_ascii=False))


if __name__ == "__main__":
    main()
