"""Bodies that were valid once: whatever is done to them, the reply is a whole one, below 500, and as described."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from support.openapi import check
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, SONNET, ShimServer

from aiexport_edge.shim.store.keys import SCOPES

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]

_TURN = {"role": "user", "content": "COUNT 3"}
_MESSAGE: dict[str, Any] = {
    "model": SONNET,
    "max_tokens": 20,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "COUNT 2"}, {"type": "text", "text": " é 🙂"}]},
        {"role": "assistant", "content": "0 1"},
        _TURN,
    ],
    "system": [{"type": "text", "text": "Be brief."}],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "stop_sequences": ["2", "END"],
    "seed": 7,
    "stream": False,
    "metadata": {"user_id": "u"},
    "response_format": {"type": "text"},
}
_BATCH = {"requests": [{"model": HAIKU, "messages": [_TURN]}, {"custom_id": "b", "params": _MESSAGE}]}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v2/messages", _MESSAGE),
    ("/v2/messages", {**_MESSAGE, "response_format": {"type": "json_object"}}),
    ("/v1/messages", {**_MESSAGE, "stream": True}),
    ("/v2/messages/stream", {"model": HAIKU, "messages": [_TURN]}),
    ("/v2/batch", _BATCH),
    ("/v2/keys", {"scopes": ["messages"], "expires_in": "90d"}),
    ("/v2/oauth/token", {"grant_type": "client_credentials"}),
]
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.0, 1.5, -0.0, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**400),
    *("", " ", "\0", "\ud800", "\u202e", "x" * 5000, "é🙂", "<|im_start|>", "user", "data:image/png;base64,"),
    *([], {}, [[]], [None], {"": None}, [[[[[[]]]]]], {"type": "image"}, {"type": "json_schema"}),
    *({"type": "image", "source": {"type": "url", "url": "file:///"}}, "ft-acme-x", "apex-haiku-4"),
]
BYTES = [
    *(b"", b"\x00", b"\xff", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"\\ud800", b"NaN", b"1e999"),
    *(b"-", b"//", b"\xef\xbb\xbf", b"[" * 300, b"9" * 5000, b" " * 1000, b'{"a":' * 250, b"null", b"\r\n\r\n"),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something, from the top down."""
    inner: list[tuple[Any, ...]] = []
    if isinstance(value, dict):
        inner = [place for name, each in value.items() for place in places(each, (*path, name))]
    elif isinstance(value, list):
        inner = [place for index, each in enumerate(value) for place in places(each, (*path, index))]
    return [path, *inner]


def mutated_value(chance: random.Random, value: Any) -> Any:
    """One place of a JSON value changed, left out or doubled."""
    value = json.loads(json.dumps(value))
    path = chance.choice(places(value))
    if not path:
        return chance.choice(ODD)
    holder = value
    for step in path[:-1]:
        holder = holder[step]
    match chance.randrange(4):
        case 0:
            del holder[path[-1]]
        case 1 if isinstance(holder, list):
            holder += [holder[path[-1]]] * chance.choice((1, 50))
        case 2 if isinstance(holder, dict):
            holder[chance.choice(("", "type", "source", "tools", "\ud800", "params"))] = chance.choice(ODD)
        case _:
            holder[path[-1]] = chance.choice(ODD)
    return value


def mutated_bytes(chance: random.Random, body: bytes) -> bytes:
    """A few bytes changed, lost, doubled or put in."""
    for _ in range(chance.choice((1, 1, 2, 8))):
        start = chance.randrange(len(body) + 1)
        end = min(len(body), start + chance.choice((0, 1, 1, 5, 60)))
        middle = chance.choice((b"", chance.choice(BYTES), body[start:end] * 2, bytes([chance.randrange(256)])))
        body = body[:start] + middle + body[end:]
    return body


def mutation(chance: random.Random) -> tuple[str, bytes]:
    path, value = chance.choice(SEEDS)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        try:
            value = mutated_value(chance, value)
        except (KeyError, IndexError, TypeError):  # nothing is left to change
            break
    body = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass")
    return path, mutated_bytes(chance, body) if chance.random() < 0.5 else body


async def send(shim: ShimServer, number: int) -> dict[int, int]:
    """Sends so many, sixteen at a time; how often there was which status."""
    key = shim.store.create_key("acme", scopes=SCOPES).key
    chance = random.Random(11)
    mutations = [mutation(chance) for _ in range(number)]
    statuses: dict[int, int] = {}

    async def work(client: httpx.AsyncClient) -> None:
        while mutations:
            path, body = mutations.pop()
            kind = "x-www-form-urlencoded" if path == "/v2/oauth/token" else "json"
            reply = await client.post(path, content=body, headers={"content-type": f"application/{kind}"})
            statuses[reply.status_code] = statuses.get(reply.status_code, 0) + 1
            assert reply.status_code < 500, (path, body, reply.text)
            try:
                check(reply)
            except Exception as error:
                raise AssertionError((path, body, reply.text)) from error

    client = httpx.AsyncClient(base_url=shim.base_url, headers={"X-API-Key": key}, timeout=60)
    async with client, asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(work(client))
    return statuses


def run(shim: ShimServer, number: int, said: Callable[[str], None] = print) -> None:
    statuses = asyncio.run(send(shim, number))
    said(f"{number} mutated bodies: {dict(sorted(statuses.items()))}")
    assert {200, 400} <= statuses.keys(), "some are still good, some are not"
    with shim.client() as client:
        assert client.post("/v2/messages", json=_MESSAGE).status_code == 200


def test_some_mutated_bodies(make_engine: Engines, make_shim: Shims) -> None:
    run(make_shim(make_engine()), 300)


@pytest.mark.prove
def test_five_thousand_mutated_bodies(make_engine: Engines, make_shim: Shims) -> None:
    run(make_shim(make_engine()), 5000)
