"""Pictures between a client and the engines: uploaded before their request, again where it goes on, and no more."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest
from support.scripted_engine import ScriptedEngine
from support.seeing import image_block
from support.shim_server import HAIKU, ShimServer

from aiexport_edge.proto import engine_pb2 as pb

Engines = Callable[..., ScriptedEngine]
Shims = Callable[..., ShimServer]
SMALL, LARGE = b"a small file", random.Random(1).randbytes(3 << 20)


def body(count: int, *files: bytes, **fields: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": f"COUNT {count}"}, *map(image_block, files)]
    return {"model": HAIKU, "max_tokens": 1500, "messages": [{"role": "user", "content": content}], **fields}


def counted(count: int) -> str:
    return "".join(f"{i} " for i in range(count))


def seeing(make_engine: Engines, name: str = "engine") -> ScriptedEngine:
    engine = make_engine(name)
    engine.kill()
    engine.vision = True
    engine.start()
    return engine


def test_files_come_whole_and_the_request_names_them(make_engine: Engines, make_shim: Shims) -> None:
    engine = seeing(make_engine)
    shim = make_shim(engine)
    with shim.client() as client:
        reply = client.post("/v2/messages", json=body(3, SMALL, LARGE))
        assert reply.status_code == 200, reply.text
        assert reply.json()["content"][0]["text"] == counted(3)
        assert client.get(f"/v2/models/{HAIKU}").json()["vision"] is True
    assert engine.seen.uploads == [[SMALL, LARGE]]
    (submitted,) = engine.seen.submitted
    blocks = submitted.request.chat.messages[0].content
    assert [block.image.upload_id for block in blocks[1:]] == ["u1.0", "u1.1"]
    assert not any(block.image.data for block in blocks)
    engine.wait_for(lambda seen: len(seen.uploads_over) == 1, "the upload's call has ended")


@pytest.mark.parametrize("code", ["full", "wrong", "broken"])
def test_an_engine_that_refuses_them(make_engine: Engines, make_shim: Shims, code: str) -> None:
    engine = seeing(make_engine)
    detail, status, said = {
        "full": (pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL, message="full", retry_after_ms=3000), 503, "no room"),
        "wrong": (pb.ErrorDetail(code=pb.ERROR_INVALID, message="is no image", field="images.1"), 400, "is no image"),
        "broken": (pb.ErrorDetail(code=pb.ERROR_INTERNAL, message="secret"), 500, ""),
    }[code]
    engine.refuse_images = detail
    shim = make_shim(engine)
    with shim.client() as client:
        reply = client.post("/v2/messages", json=body(3, SMALL, LARGE))
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert said in error["message"]
    assert "secret" not in error["message"]
    assert error.get("param") == ("messages.0.content.2" if code == "wrong" else None)
    assert not engine.seen.submitted


def test_a_full_engine_s_neighbour_takes_them(make_engine: Engines, make_shim: Shims) -> None:
    engines = [seeing(make_engine, name) for name in ("one", "two")]
    engines[0].refuse_images = pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL, message="full")
    shim = make_shim(*engines)
    with shim.client() as client:
        for _ in range(4):
            reply = client.post("/v2/messages", json=body(3, SMALL))
            assert reply.status_code == 200, reply.text
    assert engines[1].seen.uploads == [[SMALL]] * 4


def test_a_reply_that_goes_on_elsewhere_takes_its_pictures_along(make_engine: Engines, make_shim: Shims) -> None:
    engine = seeing(make_engine)
    engine.pause()
    shim = make_shim(engine)
    with shim.client() as client, client.stream("POST", "/v2/messages/stream", json=body(6, LARGE)) as reply:
        assert reply.status_code == 200
        engine.permit(3)
        lines = reply.iter_lines()
        text = ""
        for line in lines:
            if line.startswith("data: ") and (event := json.loads(line[6:]))["type"] == "content_block_delta":
                text += event["delta"]["text"]
                if text == counted(3):
                    break
        engine.kill()
        engine.free_run()
        engine.start()
        for line in lines:
            if line.startswith("data: ") and (event := json.loads(line[6:]))["type"] == "content_block_delta":
                text += event["delta"]["text"]
    assert text == counted(6)
    assert engine.seen.uploads == [[LARGE], [LARGE]]
    first, second = engine.seen.submitted
    assert first.request.chat.messages[0].content[1].image.upload_id == "u1.0"
    assert second.request.chat.messages[0].content[1].image.upload_id == "u2.0"


def test_an_engine_that_dies_over_them_is_a_503(make_engine: Engines, make_shim: Shims) -> None:
    engine = seeing(make_engine)
    engine.hang_images = True
    shim = make_shim(engine)
    payload = json.dumps(body(3, LARGE)).encode()
    with socket.create_connection(shim.address()) as client:
        client.sendall(_head(shim, len(payload)) + payload)
        engine.wait_for(lambda seen: bool(seen.uploads_begun), "an upload has begun")
        engine.kill()
        client.settimeout(60)
        assert b" 503 " in client.recv(100)
    assert not engine.seen.submitted


def test_a_client_that_leaves_while_they_are_looked_at(make_engine: Engines, make_shim: Shims) -> None:
    """Nothing is submitted for it; the next one's come through."""
    engine = seeing(make_engine)
    engine.hang_images = True
    shim = make_shim(engine)
    payload = json.dumps(body(3, SMALL)).encode()
    with socket.create_connection(shim.address()) as client:
        client.sendall(_head(shim, len(payload)) + payload)
        engine.wait_for(lambda seen: bool(seen.uploads_begun), "an upload has begun")
    engine.wait_for(lambda seen: len(seen.uploads_over) == 1, "its call has ended")
    engine.hang_images = False
    with shim.client() as client_:
        assert client_.post("/v2/messages", json=body(3, SMALL)).status_code == 200
    assert len(engine.seen.submitted) == 1


def test_a_reply_that_is_given_again_uploads_nothing(make_engine: Engines, make_shim: Shims) -> None:
    engine = seeing(make_engine)
    shim = make_shim(engine)
    with shim.client() as client:
        headers = {"Idempotency-Key": "once"}
        first, again = (client.post("/v2/messages", json=body(3, SMALL), headers=headers) for _ in range(2))
        assert first.status_code == again.status_code == 200
        assert first.content == again.content
        other = client.post("/v2/messages", json=body(3, SMALL + b"!"), headers=headers)
        assert other.status_code == 422
    assert engine.seen.uploads == [[SMALL]]


def test_a_blind_model_is_refused_before_anything_is_sent(make_engine: Engines, make_shim: Shims) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    with shim.client() as client:
        reply = client.post("/v2/messages", json=body(3, SMALL))
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "messages.0.content.1"
        assert "can't see images" in reply.json()["error"]["message"]
        batch = client.post("/v2/batch", json={"requests": [body(3), body(3, SMALL)]})
        assert batch.status_code == 400
        assert batch.json()["error"]["param"] == "requests.1.messages.0.content.1"
    assert not engine.seen.uploads_begun


def _head(shim: ShimServer, length: int) -> bytes:
    head = f"POST /v2/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {shim.key.key}\r\nContent-Length: {length}\r\n\r\n"
    return head.encode()
