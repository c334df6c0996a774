"""The official `anthropic` package with only `base_url` and `api_key` set."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import anthropic
import pytest
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, SONNET, ShimServer

from aiexport_edge.proto import engine_pb2 as pb

USER: list[anthropic.types.MessageParam] = [{"role": "user", "content": "COUNT 30"}]
TEXT = "".join(f"{i} " for i in range(30))


_clients: list[anthropic.Anthropic] = []


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while _clients:
        _clients.pop().close()


def sdk(shim: ShimServer, key: str | None = None) -> anthropic.Anthropic:
    _clients.append(anthropic.Anthropic(base_url=shim.base_url, api_key=key or shim.key.key, max_retries=0))
    return _clients[-1]


def test_create(shim: ShimServer) -> None:
    with sdk(shim) as client:
        made = client.messages.create(model=SONNET, max_tokens=100, messages=USER, system="x")
        assert made.content[0].type == "text"
        assert made.content[0].text == TEXT
        assert (made.stop_reason, made.model, made.role) == ("end_turn", SONNET, "assistant")
        assert (made.usage.output_tokens, made.usage.cache_read_input_tokens) == (30, 0)
        assert made._request_id is not None
        assert made._request_id.startswith("req_")


def test_stream(shim: ShimServer) -> None:
    with sdk(shim) as client:
        with client.messages.stream(model=SONNET, max_tokens=100, messages=USER) as stream:
            assert "".join(stream.text_stream) == TEXT
            final = stream.get_final_message()
        assert final.usage.output_tokens == 30
        assert final.stop_reason == "end_turn"
        events = client.messages.create(model=SONNET, max_tokens=3, messages=USER, stream=True)
        assert [event.type for event in events if event.type != "content_block_delta"] == [
            "message_start",
            "content_block_start",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]


def test_async_stream(shim: ShimServer) -> None:
    async def texts() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=shim.base_url, api_key=shim.key.key) as client:

            async def one() -> str:
                async with client.messages.stream(model=HAIKU, max_tokens=100, messages=USER) as stream:
                    return await stream.get_final_text()

            return await asyncio.gather(*(one() for _ in range(8)))

    assert asyncio.run(texts()) == [TEXT] * 8


def test_models(shim: ShimServer) -> None:
    with sdk(shim) as client:
        assert [model.id for model in client.models.list(limit=1)][-2:] == [SONNET, HAIKU]  # it turns the pages
        assert client.models.retrieve("apex-haiku-4").id == HAIKU


def test_error_classes(make_engine: Callable[..., ScriptedEngine], make_shim: Callable[..., ShimServer]) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    with sdk(shim) as client:

        def create(**fields: object) -> None:
            client.messages.create(**{"model": HAIKU, "max_tokens": 10, "messages": USER, **fields})  # type: ignore[call-overload]

        with pytest.raises(anthropic.BadRequestError) as bad:
            create(max_tokens=0)
        assert bad.value.body["error"]["param"] == "max_tokens"  # type: ignore[index]
        with pytest.raises(anthropic.NotFoundError):
            create(model="nope")
        with pytest.raises(anthropic.RequestTooLargeError):
            create(system="x" * (33 << 20))
        with sdk(shim, "axp_live_" + "x" * 43) as stranger, pytest.raises(anthropic.AuthenticationError):
            stranger.models.list()
        shim.store.create_workspace("frugal", "free")
        with sdk(shim, shim.store.create_key("frugal").key) as poor, pytest.raises(anthropic.PermissionDeniedError):
            poor.messages.create(model=SONNET, max_tokens=10, messages=USER)
        engine.refuse = pb.ErrorDetail(code=pb.ERROR_TENANT_QUEUE_FULL)
        with pytest.raises(anthropic.RateLimitError) as limited:
            create()
        assert limited.value.response.headers["retry-after"]
        engine.refuse = pb.ErrorDetail(code=pb.ERROR_QUEUE_FULL)
        with pytest.raises(anthropic.APIStatusError) as full:
            create()
        assert full.value.status_code == 503
        engine.refuse = None
        engine.fail_after = (2, pb.ErrorDetail(code=pb.ERROR_INTERNAL))
        with pytest.raises(anthropic.InternalServerError):
            create()
        with (
            pytest.raises(anthropic.APIStatusError) as broken,
            client.messages.stream(model=HAIKU, max_tokens=10, messages=USER) as stream,
        ):
            stream.until_done()
        assert broken.value.body["error"]["type"] == "api_error"  # type: ignore[index]


def test_retries_reach_a_restarted_engine(
    make_engine: Callable[..., ScriptedEngine], make_shim: Callable[..., ShimServer]
) -> None:
    """A 503 with its Retry-After is what the package retries by itself."""
    engine = make_engine()
    shim = make_shim(engine)
    engine.kill()
    with anthropic.Anthropic(base_url=shim.base_url, api_key=shim.key.key, max_retries=8) as client:
        timer = threading.Timer(0.5, engine.start)
        timer.start()
        made = client.messages.create(model=HAIKU, max_tokens=100, messages=USER)
        timer.join()
    assert made.usage.output_tokens == 30


def test_a_bearer_key_and_a_kept_reply(shim: ShimServer) -> None:
    """Without `X-API-Key`; the raw reply is there too; a second call with the same key is the first one's reply."""
    with anthropic.Anthropic(base_url=shim.base_url, api_key=None, auth_token=shim.key.key) as client:
        headers = {"Idempotency-Key": "sdk-once"}
        raw = client.messages.with_raw_response.create(
            model=SONNET, max_tokens=100, messages=USER, extra_headers=headers
        )
        assert raw.headers["request-id"].startswith("req_")
        again = client.messages.create(model=SONNET, max_tokens=100, messages=USER, extra_headers=headers)
        assert again.id == raw.parse().id
        with pytest.raises(anthropic.UnprocessableEntityError):
            client.messages.create(model=SONNET, max_tokens=99, messages=USER, extra_headers=headers)
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model=SONNET, max_tokens=9, messages=USER, extra_headers={"Idempotency-Key": ""})


def test_everything_a_message_may_have(shim: ShimServer) -> None:
    with sdk(shim) as client:
        made = client.messages.create(
            model=HAIKU,
            max_tokens=100,
            system=[{"type": "text", "text": "Be brief."}],
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "COUNT 9"}]},
                {"role": "assistant", "content": "0 "},
                {"role": "user", "content": "COUNT 9"},
            ],
            stop_sequences=["7"],
            metadata={"user_id": "u"},
            extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1},
        )
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", "7")


def test_a_stream_that_is_left_is_aborted(
    make_engine: Callable[..., ScriptedEngine], make_shim: Callable[..., ShimServer]
) -> None:
    engine = make_engine()
    shim = make_shim(engine)
    engine.pause()
    engine.permit(2)
    with sdk(shim) as client:
        with client.messages.stream(model=HAIKU, max_tokens=100, messages=USER) as stream:
            assert next(iter(stream.text_stream)).startswith("0 ")
        engine.wait_for(lambda seen: len(seen.aborted) == 1, "the abort")
