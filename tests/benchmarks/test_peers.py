"""The comparison with other servers: its client against replies cut anywhere; its model and tables."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from benchmarks.peers.cells import CELLS, spread
from benchmarks.peers.client import RequestFailed, stream
from benchmarks.peers.model import CONFIG, make_tokenizer, tensor_shapes
from benchmarks.peers.table import print_tables

EVENTS = [b'data: {"text": "one"}\n\n', b": ping\n\n", b'data: {"text": " two", "num": 2}\n\n', b"data: [DONE]\n\n"]
HEAD = b"HTTP/1.1 %s\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def read(event: dict[str, Any]) -> tuple[str, int | None]:
    return event["text"], event.get("num")


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def with_server(answer: bytes, ask: Callable[[int], Awaitable[Any]]) -> Any:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        return await ask(server.sockets[0].getsockname()[1])


@pytest.mark.parametrize("size", [3, 7, 1000])
def test_events_are_read_however_they_are_cut(size: int) -> None:
    answer = HEAD % b"200 OK" + chunked(b"".join(EVENTS), size)
    reply = asyncio.run(with_server(answer, lambda port: stream(port, "/", {}, {"a": 1}, read)))
    assert len(reply.texts) == 2
    assert reply.num_tokens == 2
    assert reply.first_s > 0
    assert len(reply.gaps_s) == 1


def test_a_refusal_says_what_the_server_said() -> None:
    answer = HEAD % b"503 Service Unavailable" + chunked(b"loading", 4)
    with pytest.raises(RequestFailed, match="status 503: loading"):
        asyncio.run(with_server(answer, lambda port: stream(port, "/", {}, {}, read)))


def test_the_model_has_a_token_for_every_row_of_its_embedding() -> None:
    tokenizer = make_tokenizer(5000)
    ids = {*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])}
    assert ids == set(range(5000))
    assert tensor_shapes()["model.embed_tokens.weight"] == (CONFIG["vocab_size"], CONFIG["hidden_size"])


def test_tables_say_what_is_missing_and_what_was_noisy(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {
        "tokens_per_s": 123.4,
        "tokens_per_s_spread": 0.1,
        "first_token_p50_ms": 50.0,
        "first_token_spread": None,
        "gap_p50_ms": 9.5,
        "gap_p99_ms": 20.0,
        "others_cpu_share": 0.2,
    }
    servers = {"a": {"cells": {CELLS[0].key: figures}, "memory_mib": 10}, "b": {"cells": {}}}
    print_tables({"servers": servers})
    lines = capsys.readouterr().out.splitlines()
    assert "| 128 x 1 | 123 ±5 % * | – |" in lines
    assert "| Memory (PSS of all processes), MiB | 10 | – |" in lines


def test_spread() -> None:
    assert spread([2.0]) is None
    assert spread([9.0, 10.0, 11.0]) == 0.2
