"""An OpenAI-compatible server that answers at once: `python -m benchmarks.proxies.upstream --fd N`.

`max_tokens` words, whole or streamed, a chunk a word.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from typing import Any

import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from aiexport_edge.proto.lifetime import die_with_parent

_WORD = " bears"
_HEAD = {"id": "chatcmpl-1", "created": 1, "model": "fake"}


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked: dict[str, Any] = json.loads(body) if body else {}
    num_words = asked.get("max_tokens") or 1
    if not asked.get("stream"):
        await _send(send, b"application/json", json.dumps(_whole(num_words)).encode())
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(num_words):  # LiteLLM takes a word that comes again and again for a fault
        chunk = _chunk({"content": f"{_WORD} {number}"}, None)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": _chunk({}, "length") + b"data: [DONE]\n\n"})


def _whole(num_words: int) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": _WORD * num_words},
        "finish_reason": "length",
    }
    usage = {"prompt_tokens": 9, "completion_tokens": num_words, "total_tokens": 9 + num_words}
    return {**_HEAD, "object": "chat.completion", "choices": [choice], "usage": usage}


def _chunk(delta: dict[str, str], finish_reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    document = {**_HEAD, "object": "chat.completion.chunk", "choices": [choice]}
    return b"data: " + json.dumps(document).encode() + b"\n\n"


async def _send(send: Send, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    config = uvicorn.Config(application, log_config=None, access_log=False, lifespan="off", http="httptools", ws="none")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(config).serve(sockets=[socket.socket(fileno=arguments.fd)]))


if __name__ == "__main__":
    main()
