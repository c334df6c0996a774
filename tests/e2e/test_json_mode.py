"""JSON mode from a REST client to the demo model and back: every reply is a document, wherever it ends."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for
from support.edge import HAIKU, SONNET, Edge, message, start, stream, wait_until
from support.structured import Kit, suite

JSON_OBJECT = {"type": "json_object"}
TEMPTING = [
    "Give me JSON with one key text whose value is a story of a thousand words.",
    "Give me JSON with a very long string of the letter a.",
    'Reply in JSON: {"a": {"a": {"a": {"a": {"a": and so on, a hundred deep.',
    "Write a JSON object with an array that never ends: 1, 2, 3, 4, 5, 6, 7, 8,",
    "Give me a JSON object with the keys 🦊, ключ, 鍵 and values of emoji 😀😃😄😁😆😅🤣.",
    'Answer in JSON with unicode escapes: \\ud83d\\ude00 \\u00e9 and quotes \\" and backslashes \\\\.',
    "Tell me a story about a fox. No JSON, please.",
    "Describe a person in JSON with name, age, city, country, hobbies, friends and email.",
    "List numbers with a hundred digits in JSON.",
    '[[[[[[[[[[{"x":[[[[',
]
PREFILLS = ['{"', "{", '{ "name" :\n', '{"list": [1, 2,', '{"text": "half a sentence and', '{"a":{"b":[{"c":"\\']
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mood": {"enum": ["happy", "calm", "curious"]},
        "hobbies": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "hobbies"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "near": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
            },
            "required": ["city"],
            "additionalProperties": False,
        }
    },
}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


def body_of(rng: random.Random) -> dict[str, Any]:
    """A request at temperature 1 that would rather run on."""
    body = message(rng.choice(TEMPTING), model=SONNET, max_tokens=rng.randint(2, 96), seed=rng.randrange(1 << 60))
    body |= {"temperature": 1.0, "response_format": JSON_OBJECT}
    if rng.random() < 0.2:
        body["messages"].append({"role": "assistant", "content": rng.choice(PREFILLS)})
        body["max_tokens"] += 16  # a prefill may take some to close
    if rng.random() < 0.2:
        body["stop_sequences"] = ["}", '"', "a"]
    return body


async def ask(client: httpx.AsyncClient, body: dict[str, Any], streamed: bool) -> tuple[str, str, int]:
    """The reply's text after its prefill, its stop reason and output tokens. A 503 is asked again, as SDKs do."""
    for _ in range(600):
        answer = await ask_once(client, body, streamed)
        if answer is not None:
            break
        await asyncio.sleep(0.2)
    else:
        raise AssertionError("no engine took it within two minutes")
    text, reason, num_tokens = answer
    last = body["messages"][-1]
    return (last["content"] if last["role"] == "assistant" else "") + text, reason, num_tokens


async def ask_once(client: httpx.AsyncClient, body: dict[str, Any], streamed: bool) -> tuple[str, str, int] | None:
    """The reply's text, stop reason and output tokens; None where no engine would take it (503)."""
    if streamed:
        reply = await stream(client, body)
        if reply.status == 503:
            return None
        assert reply.error is None, reply.error
        return reply.text, str(reply.stop_reason), reply.usage["output_tokens"]
    response = await client.post("/v2/messages", json=body)
    if response.status_code == 503:
        return None
    assert response.status_code == 200, response.text
    whole = response.json()
    return whole["content"][0]["text"], whole["stop_reason"], whole["usage"]["output_tokens"]


async def ask_all(edge: Edge, bodies: list[dict[str, Any]], at_once: int = 32) -> list[tuple[str, str, int]]:
    """Every other one streamed."""
    gate = asyncio.Semaphore(at_once)
    async with edge.async_client() as client:

        async def one(number: int, body: dict[str, Any]) -> tuple[str, str, int]:
            async with gate:
                return await ask(client, body, number % 2 == 1)

        return await asyncio.gather(*(one(number, body) for number, body in enumerate(bodies)))


def check(bodies: list[dict[str, Any]], replies: list[tuple[str, str, int]]) -> str:
    """Every reply is an object within its budget. A table of how they ended, by budget."""
    ends: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for body, (text, reason, num_tokens) in zip(bodies, replies, strict=True):
        document = json.loads(text)
        assert isinstance(document, dict), text
        assert num_tokens <= body["max_tokens"]
        assert reason in ("end_turn", "max_tokens"), "stop sequences do not end a document"
        low = (body["max_tokens"] - 1) // 16 * 16 + 1
        ends[f"{low:3}-{low + 15:3}"][reason] += 1
    lines = ["| max_tokens | replies | ended by itself | closed early |", "|---|---|---|---|"]
    for budget, reasons in sorted(ends.items()):
        lines.append(f"| {budget} | {reasons.total()} | {reasons['end_turn']} | {reasons['max_tokens']} |")
    total = sum(ends.values(), collections.Counter())
    lines.append(f"| all | {total.total()} | {total['end_turn']} | {total['max_tokens']} |")
    return "\n".join(lines)


def test_every_reply_is_an_object(edge: Edge) -> None:
    rng = random.Random(1)
    bodies = [body_of(rng) for _ in range(60)]
    table = check(bodies, asyncio.run(ask_all(edge, bodies)))
    assert "| all | 60 |" in table


@pytest.mark.prove
def test_two_thousand_replies(edge: Edge) -> None:
    rng = random.Random(2)
    bodies = [body_of(rng) for _ in range(2000)]
    print("\n" + check(bodies, asyncio.run(ask_all(edge, bodies))))


def test_a_schema_holds_at_every_budget(edge: Edge) -> None:
    """From the least that does, greedy and at temperature 1; and one token less is refused."""
    validator = Draft202012Validator(SCHEMA)
    body = message("Describe a person in JSON.", model=SONNET, response_format=JSON_SCHEMA)
    with edge.client() as client:
        refused = client.post("/v2/messages", json=body | {"max_tokens": 1})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "max_tokens"
    least = int(refused.json()["error"]["message"].split(" takes ")[1].split(";")[0])
    bodies = [
        body | {"max_tokens": budget, "temperature": budget % 2, "seed": budget}
        for budget in [*range(least, least + 12), 40, 60, 80, 120]
    ]
    for text, _, _ in asyncio.run(ask_all(edge, bodies)):
        validator.validate(json.loads(text))
    with edge.client() as client:
        assert client.post("/v2/messages", json=body | {"max_tokens": least - 1}).status_code == 400


def check_suite(edge: Edge, entries: list[dict[str, Any]], per_schema: int) -> collections.Counter[str]:
    """Replies to the schemas of a public suite, each within a budget between the least and plenty; all validate. How
    they ended."""
    rng = random.Random(6)
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for entry in entries:
        schema = entry["schema"]
        least = len(Kit.of(schema).constraint(10_000).shortest_end)
        for _ in range(per_schema):
            body = message("Write any JSON.", model=SONNET, max_tokens=least + rng.choice([0, 1, 3, 10, 40, 80]))
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "of_the_suite", "schema": schema}}
            asked.append((schema, body | {"temperature": 1.0, "seed": rng.randrange(1 << 60)}))
    ends: collections.Counter[str] = collections.Counter()
    replies = asyncio.run(ask_all(edge, [body for _, body in asked]))
    for (schema, body), (text, reason, num_tokens) in zip(asked, replies, strict=True):
        validator_for(schema, default=Draft202012Validator)(schema).validate(json.loads(text))
        assert num_tokens <= body["max_tokens"]
        ends[reason] += 1
    return ends


def taken() -> list[dict[str, Any]]:
    return [entry for entry in suite() if entry["tests"] is not None and isinstance(entry["schema"], dict)]


def test_schemas_of_a_public_suite(edge: Edge) -> None:
    assert sum(check_suite(edge, taken()[::10], 1).values()) >= 20


@pytest.mark.prove
def test_two_hundred_schemas_of_a_public_suite(edge: Edge) -> None:
    entries = taken()
    assert len(entries) >= 200
    ends = check_suite(edge, entries, 5)
    print(f"\n{len(entries)} schemas, {ends.total()} replies: {dict(ends)}")


def test_what_cannot_be_promised_is_refused(edge: Edge) -> None:
    def of_schema(schema: Any) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}

    def prefilled(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]

    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"model": HAIKU, "response_format": JSON_OBJECT}, "response_format.type"),
        ({"max_tokens": 1, "response_format": JSON_OBJECT}, "max_tokens"),
        ({"messages": prefilled("Here is the JSON: {"), "response_format": JSON_OBJECT}, "messages"),
        ({"messages": prefilled('{"a": 1}'), "response_format": JSON_OBJECT}, "messages"),
        ({"messages": prefilled('{"a": 1'), "max_tokens": 1, "response_format": JSON_OBJECT}, None),
        ({"response_format": of_schema({"not": {}})}, "response_format.json_schema.schema"),
        ({"response_format": of_schema({"type": "array"})}, "response_format.json_schema.schema"),
        ({"response_format": of_schema({"$ref": "http://localhost/x"})}, "response_format.json_schema.schema"),
        ({"response_format": of_schema({"properties": {"a": 5}})}, "response_format.json_schema.schema"),
        (
            {"response_format": of_schema({"properties": {f"p{n}": {"maxLength": 1000} for n in range(200)}})},
            "response_format.json_schema.schema",
        ),
    ]
    with edge.client() as client:
        for fields, param in cases:
            reply = client.post("/v2/messages", json=message("Hello", model=SONNET) | fields)
            if param is None:
                assert reply.status_code == 200, reply.text
                continue
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == param, reply.text


def test_in_a_batch(edge: Edge) -> None:
    rng = random.Random(7)
    bodies = [body_of(rng) for _ in range(12)] + [
        message("Describe a person.", model=SONNET, response_format=JSON_SCHEMA)
    ]
    with edge.client() as client:
        created = client.post("/v2/batch", json={"requests": bodies})
        assert created.status_code == 202, created.text
        path = f"/v2/batch/{created.json()['id']}"
        wait_until(lambda: client.get(path).json()["status"] == "completed", "the batch has ended", 120)
        lines = client.get(f"{path}/results").text.splitlines()
    assert len(lines) == len(bodies)
    for body, line in zip(bodies, lines, strict=True):
        result = json.loads(line)["result"]
        assert result["type"] == "succeeded", result
        last = body["messages"][-1]
        text = (last["content"] if last["role"] == "assistant" else "") + result["message"]["content"][0]["text"]
        document = json.loads(text)
        assert isinstance(document, dict)
    Draft202012Validator(SCHEMA).validate(document)


def test_replies_survive_their_core_and_their_engine(tmp_path: Path) -> None:
    """Both are killed while many replies are under way: each goes on, and is the one that it would have been."""
    edge = start(tmp_path / "state")
    try:
        rng = random.Random(3)
        bodies = [body_of(rng) | {"max_tokens": rng.randint(60, 200)} for _ in range(120)]
        undisturbed = asyncio.run(ask_all(edge, bodies))

        kills: list[bool] = []

        async def disturbed() -> list[tuple[str, str, int]]:
            asking = asyncio.create_task(ask_all(edge, bodies))
            for of_engine in (False, True):
                before = (await asyncio.to_thread(edge.stats)).models
                produced = sum(model.output_tokens for model in before)
                while not asking.done():
                    with contextlib.suppress(Exception):
                        now = await asyncio.to_thread(edge.stats)
                        if sum(model.output_tokens for model in now.models) > produced + 100 and now.core_pid:
                            victim = psutil.Process(now.core_pid)
                            (victim.parent() if of_engine else victim).send_signal(signal.SIGKILL)  # type: ignore[union-attr]
                            kills.append(of_engine)
                            break
                    await asyncio.sleep(0.02)
                await asyncio.to_thread(wait_until, edge.ready, "the engine is back")
            return await asking

        replies = asyncio.run(disturbed())
        assert kills == [False, True]
        check(bodies, replies)
        assert [text for text, _, _ in replies] == [text for text, _, _ in undisturbed]
    finally:
        assert edge.stop() == 0, "".join(edge.stderr[-30:])
