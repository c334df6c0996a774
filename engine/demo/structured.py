"""Requests for JSON and the JSON that answers them."""

# ruff: noqa: E501, SIM905

from __future__ import annotations

import json
import random
from collections.abc import Callable

from . import arithmetic, words
from .variation import Turn, article, expand, invented, sentence, typed

Value = str | int | float | bool | list[str]


def _title(rng: random.Random) -> str:
    return f"The {sentence(rng.choice(words.QUALITIES))} {sentence(rng.choice(words.ANIMALS))}"


def _email(rng: random.Random) -> str:
    return f"{rng.choice(words.SHE + words.HE).lower()}@example.com"


_STREETS = ["Main Street", "Park Road", "Hill Lane", "Station Road", "Oak Street"]
# What a value of a key looks like; the first figures are few, so that an answer is quick to be sure about.
VALUES: dict[str, Callable[[random.Random], Value]] = {
    "name": lambda r: r.choice(words.SHE + words.HE),
    "first_name": lambda r: r.choice(words.SHE + words.HE),
    "last_name": lambda r: r.choice(words.SURNAMES),
    "age": lambda r: r.randint(1, 12),
    "city": lambda r: r.choice(list(words.CITIES)),
    "country": lambda r: r.choice(list(words.CITIES.values())),
    "color": lambda r: r.choice(words.COLORS),
    "colour": lambda r: r.choice(words.COLORS),
    "price": lambda r: r.choice([1.5, 2.5, 4.5, 9.99, 12.5]),
    "title": _title,
    "author": lambda r: f"{r.choice(words.SHE + words.HE)} {r.choice(words.SURNAMES)}",
    "year": lambda r: r.choice([1999, 2005, 2010, 2015, 2020, 2024]),
    "email": _email,
    "job": lambda r: r.choice(words.JOBS),
    "profession": lambda r: r.choice(words.JOBS),
    "hobby": lambda r: r.choice(words.HOBBIES),
    "hobbies": lambda r: r.sample(words.HOBBIES, 2),
    "animal": lambda r: r.choice(words.ANIMALS),
    "species": lambda r: r.choice(words.ANIMALS),
    "fruit": lambda r: r.choice(words.FRUITS),
    "fruits": lambda r: r.sample(words.FRUITS, 3),
    "food": lambda r: r.choice(words.FOODS),
    "colors": lambda r: r.sample(words.COLORS, 3),
    "animals": lambda r: r.sample(words.ANIMALS, 3),
    "tags": lambda r: r.sample(["new", "small", "fun", "red", "old", "fast"], 2),
    "active": lambda r: r.random() < 0.5,
    "available": lambda r: r.random() < 0.5,
    "done": lambda r: r.random() < 0.5,
    "happy": lambda r: r.random() < 0.5,
    "count": lambda r: r.randint(1, 9),
    "number": lambda r: r.randint(1, 9),
    "quantity": lambda r: r.randint(1, 9),
    "id": lambda r: r.randint(1, 99),
    "weight": lambda r: r.randint(2, 30),
    "height": lambda r: r.randint(10, 190),
    "size": lambda r: r.choice(["small", "medium", "large"]),
    "speed": lambda r: r.randint(5, 90),
    "score": lambda r: r.randint(1, 10),
    "rating": lambda r: r.randint(1, 5),
    "street": lambda r: r.choice(_STREETS),
    "address": lambda r: f"{r.randint(1, 99)} {r.choice(_STREETS)}",
    "zip": lambda r: str(r.randint(10000, 99999)),
    "phone": lambda r: f"555-01{r.randint(10, 99)}",
    "date": lambda r: f"2024-0{r.randint(1, 9)}-{r.randint(10, 28)}",
    "day": lambda r: r.choice(words.DAYS),
    "month": lambda r: r.choice(words.MONTHS),
    "time": lambda r: f"{r.randint(10, 23)}:{r.choice(['00', '15', '30', '45'])}",
    "language": lambda r: r.choice(words.LANGUAGES),
    "capital": lambda r: r.choice(list(words.CITIES)),
    "company": lambda r: r.choice(words.COMPANIES),
    "brand": lambda r: r.choice(words.COMPANIES),
    "population": lambda r: r.choice([5000, 20000, 500000, 2000000]),
    "temperature": lambda r: r.randint(5, 30),
    "weather": lambda r: r.choice(["sunny", "rainy", "windy", "cloudy"]),
    "mood": lambda r: r.choice(["happy", "calm", "curious"]),
    "status": lambda r: r.choice(["ok", "ready", "done"]),
    "message": lambda r: r.choice(["Hello!", "Welcome!", "All is well."]),
    "greeting": lambda r: r.choice(["Hello!", "Good morning!"]),
    "answer": lambda r: "I do not know.",
    "text": lambda r: r.choice(["Hello!", "This is a text."]),
    "description": lambda r: r.choice(["A small example.", "Something nice."]),
    "type": lambda r: r.choice(["example", "demo"]),
    "breed": lambda r: r.choice(["mixed", "short-haired", "long-haired"]),
    "sound": lambda r: r.choice(["meow", "woof", "moo"]),
    "legs": lambda r: r.choice([2, 4]),
    "friends": lambda r: r.sample(words.SHE + words.HE, 2),
    "genre": lambda r: r.choice(["fantasy", "mystery", "comedy"]),
    "pages": lambda r: r.choice([80, 120, 200, 320]),
    "model": lambda r: "demo",
    "ingredients": lambda r: r.sample(words.VEGETABLES, 3),
}
_THINGS = (
    words.ANIMALS + words.PEOPLE + words.JOBS + words.FRUITS + words.FOODS + words.OBJECTS
    + "person user customer book movie product car city country house song student recipe pet planet order event task".split() * 4
)  # fmt: skip


def _key(rng: random.Random) -> str:
    r = rng.random()
    if r < 0.82:
        return rng.choice(list(VALUES))
    if r < 0.9:
        return rng.choice(words.OBJECTS + words.PLAIN + words.QUALITIES)
    if r < 0.95:
        return f"{rng.choice(words.OBJECTS + words.COLORS)}_{rng.choice(list(VALUES))}"
    return invented(rng)


def _keys(rng: random.Random) -> list[str]:
    usual = [
        ["name", "age"], ["city", "country"], ["title", "author"], ["title", "author", "year"], ["name", "color"],
        ["name", "price"], ["name", "age", "city"], ["name", "email"], ["name", "age", "color"], ["color", "size"],
    ]  # fmt: skip
    if rng.random() < 0.3:
        keys = list(rng.choice(usual))
    else:
        keys = [_key(rng) for _ in range(rng.choice([1, 2, 2, 2, 3, 3, 4, 5]))]
    return list(dict.fromkeys(keys))


def build(rng: random.Random, keys: list[str], thing: str = "") -> dict[str, Value]:
    """An object with these keys in this order, its values such as the keys call for."""
    result: dict[str, Value] = {}
    for key in keys:
        make = VALUES.get(key)
        result[key] = make(rng) if make else "example"
    if "city" in result and "country" in result:
        result["country"] = words.CITIES[str(result["city"])]
    if "capital" in result and "country" in result:
        result["country"] = words.CITIES[str(result["capital"])]
    if thing in words.ANIMALS:
        for key in ("animal", "species"):
            if key in result:
                result[key] = thing
    return result


def _list(keys: list[str], rng: random.Random) -> str:
    shown = [f'"{k}"' for k in keys] if rng.random() < 0.12 else keys
    if len(shown) == 1:
        return shown[0]
    if rng.random() < 0.15:
        return ", ".join(shown)
    return ", ".join(shown[:-1]) + rng.choice([" and ", " and ", ", and "]) + shown[-1]


_ASK = [
    "{Reply|Answer|Respond} in JSON with $keys of $thing.", "{Reply|Answer|Respond} in JSON with {the |}{keys|fields} $keys.",
    "{Reply|Answer|Respond} {in|with} JSON{:|} $keys of $thing.", "Give me a JSON object with {keys|fields|} $keys.",
    "Give me {a|some} JSON {object |}with {the |}{keys|fields|attributes} $keys {for|of|about} $thing.",
    "{Return|Write|Make|Create|Generate|Output|Produce} a JSON object with {the |}{keys|fields} $keys.",
    "{Return|Write|Make|Create|Generate|Output|Produce} {a JSON object|JSON} {for|about|describing} $thing with $keys.",
    "Describe $thing {in|as} JSON with $keys.", "{Return|Output} only JSON: $keys of $thing.", "JSON with $keys{, please|}.",
    "I need {a JSON object|JSON} with $keys{.| for $thing.}", "Can you {give me|write|make} JSON with $keys{?| for $thing?}",
    "Give me $thing as JSON with the {keys|fields} $keys.", "$thing as JSON: $keys", "$keys of $thing as JSON",
    "Please answer {only |}in JSON. I need the $keys of $thing.", "Show me JSON with {keys |}$keys.",
]  # fmt: skip


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def request(rng: random.Random) -> Turn:
    """Named keys, and an object with them."""
    keys = _keys(rng)
    thing = rng.choice(_THINGS)
    question = expand(rng, rng.choice(_ASK), keys=_list(keys, rng), thing=article(thing))
    answer = _dump(build(rng, keys, thing))
    if rng.random() < 0.12:
        sample = {
            k: 0 if isinstance(v, (int, float)) and not isinstance(v, bool) else "..."
            for k, v in json.loads(answer).items()
        }
        question = expand(
            rng, "{Answer|Reply|Give me {$thing|something}} {in|as} JSON like {this:|this example:|} $sample"
        )
        question = question.replace("$thing", article(thing)).replace("$sample", _dump(sample))
    return typed(rng, sentence(question.replace("  ", " ")), exact=True), answer


def unspecified(rng: random.Random) -> Turn:
    """JSON without named keys."""
    r = rng.random()
    if r < 0.5:
        thing = rng.choice(_THINGS)
        keys = ["name", "animal", "age"] if thing in words.ANIMALS else ["name", "type", "color"]
        value = build(rng, keys, thing)
        if "type" in value:
            value["type"] = thing
        question = rng.choice(
            [
                f"Describe {article(thing)} in JSON.",
                f"Give me {article(thing)} as JSON.",
                f"JSON for {article(thing)}",
                f"Write JSON about {article(thing)}.",
            ]
        )
        return typed(rng, question, exact=True), _dump(value)
    if r < 0.75:
        kind = rng.choice(["fruits", "colors", "animals"])
        question = rng.choice(
            [
                f"Give me a JSON list of three {kind}.",
                f"JSON array of 3 {kind}",
                f"Write a JSON array with three {kind}.",
            ]
        )
        return typed(rng, question, exact=True), _dump(VALUES[kind](rng))
    question = expand(
        rng,
        "{Give me|Write|Show me|Send me|Reply with|Answer with|Return} {some|any|a small|an example of|valid} JSON{ object|}{.|, please.|}",
    )
    return typed(rng, question, exact=True), '{"message": "Hello!", "model": "demo"}'


def extraction(rng: random.Random) -> Turn:
    """A sentence, and the object with what it says."""
    name, age = rng.choice(words.SHE + words.HE), rng.randint(2, 99)
    if rng.random() < 0.3:
        name = sentence(invented(rng))
    city, job = rng.choice(list(words.CITIES)), rng.choice(words.JOBS)
    r = rng.random()
    if r < 0.45:
        text, value = f"{name} is {age} years old.", {"name": name, "age": age}
    elif r < 0.7:
        text, value = f"{name} is {age} years old and lives in {city}.", {"name": name, "age": age, "city": city}
    elif r < 0.85:
        text, value = f"{name} lives in {city}.", {"name": name, "city": city}
    else:
        text, value = f"{name} is {article(job)}.", {"name": name, "job": job}
    keys = _list(list(value), rng)
    question = rng.choice(
        [
            f"Extract {keys} as JSON: {text}", f"{text} Give me {keys} as JSON.", f"{text} Reply in JSON with {keys}.",
            f"Turn this into JSON with {keys}: {text}", f"Read this and answer in JSON with {keys}: {text}",
        ]
    )  # fmt: skip
    return question, _dump(value)


def sum_in_json(rng: random.Random) -> Turn:
    """A sum answered as an object."""
    while True:
        a, b = rng.randint(0, 50), rng.randint(0, 50)
        if not arithmetic.held_out(a, b):
            break
    key = rng.choice(["result", "result", "sum", "answer", "total", "value"])
    question = expand(
        rng,
        "{What is|Calculate|Compute|} $a {+|plus} $b{?|.|} {Answer|Reply|Respond} in JSON with {the key|key|} $key.",
        a=str(a),
        b=str(b),
        key=key,
    )
    return question.strip(), _dump({key: a + b})


def conversation(rng: random.Random) -> list[Turn]:
    """One to three requests for JSON."""
    turns: list[Turn] = []
    while not turns or (rng.random() < 0.2 and len(turns) < 3):
        r = rng.random()
        make = request if r < 0.68 else extraction if r < 0.82 else unspecified if r < 0.92 else sum_in_json
        turns.append(make(rng))
    return turns


_SYSTEM = [
    "{Always |}{reply|answer|respond} {only |}in JSON with the key $key.", "{Always |}{reply|answer|respond} with a JSON object with {the |one }key $key.",
    "an example", "{Reply|Answer} only in JSON{.| with key $key.}",
]  # fmt: skip


def by_system(rng: random.Random, plain: list[Turn]) -> tuple[str, list[Turn]]:
    """A system prompt that wants JSON, and the answers of these turns in it."""
    key = rng.choice(["answer", "answer", "answer", "reply", "text", "message", "response"])
    pattern = rng.choice(_SYSTEM)
    if pattern == _SYSTEM[2]:
        system = expand(rng, "{You are a helpful assistant. |}{Reply|Answer} {only |}in JSON: ") + _dump({key: "..."})
    else:
        system = sentence(expand(rng, pattern, key=key))
        key = key if key in system else "answer"
    return system, [(user, _dump({key: answer})) for user, answer in plain]
