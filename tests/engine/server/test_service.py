"""Generate, CountTokens, ListModels and Stats, and the standard services beside them."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.engine_server import (
    CONTEXT_WINDOW,
    MAX_OUTPUT_TOKENS,
    Engine,
    Reply,
    SessionClient,
    chat,
    engine,
    run,
    until,
)

from aiexport_edge.engine.server.errors import DETAIL_TRAILER
from aiexport_edge.engine.server.listener import MAX_MESSAGE_BYTES, SERVICE_NAME
from aiexport_edge.engine.text.template import Message
from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def detail_of(error: grpc.aio.AioRpcError) -> pb.ErrorDetail:
    """The detail in the trailer."""
    trailers: Any = error.trailing_metadata()
    return pb.ErrorDetail.FromString(dict(trailers)[DETAIL_TRAILER])


async def generate(served: Engine, request: pb.GenerateRequest) -> Reply:
    reply = Reply()
    async for event in served.stub.Generate(request):
        reply.hear(event)
    return reply


def test_generate_is_a_session_of_one(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            session = await SessionClient(served.stub).hello()
            text = served.text(served.expected(chat("a"), 40))
            for request in (
                chat("a", max_tokens=40, sampling=pb.SamplingParams(seed=1)),
                chat("a", max_tokens=40, sampling=pb.SamplingParams(seed=1, stop_sequences=[text[20:23]])),
            ):
                unary, reply = await generate(served, request), await session.end(await session.submit(1, request))
                assert (unary.accepted, unary.finished) == (reply.accepted, _uncached(reply.finished, unary.finished))
                assert (unary.text, unary.ids) == (reply.text, reply.ids)
                assert unary.finished is not None
                assert unary.started is not None

    run(test())


def _uncached(finished: pb.Finished | None, like: pb.Finished | None) -> pb.Finished | None:
    """The same but for what the prefix cache held the second time."""
    assert finished is not None
    assert like is not None
    copy = pb.Finished()
    copy.CopyFrom(finished)
    copy.cached_tokens = like.cached_tokens
    return copy


def test_refusals_are_status_codes_with_a_detail(directory: Path) -> None:
    async def test() -> None:
        too_long = pb.GenerateRequest(model="m0", token_ids=pb.TokenIds(ids=[1] * 5000))
        resume = chat("a", max_tokens=None, resume=pb.Resume(model_revision="another"))
        async with engine(
            directory, "--step-s", 0.003, max_num_running=1, queue_size=1, tenant_queue_share=1.0
        ) as served:
            for request, status, code in (
                (chat("a", max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT, pb.ERROR_INVALID),
                (chat("a", model="m9"), grpc.StatusCode.NOT_FOUND, pb.ERROR_NOT_FOUND),
                (too_long, grpc.StatusCode.INVALID_ARGUMENT, pb.ERROR_CONTEXT_LENGTH),
                (resume, grpc.StatusCode.FAILED_PRECONDITION, pb.ERROR_REVISION_CHANGED),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await generate(served, request)
                detail = detail_of(raised.value)
                assert (raised.value.code(), detail.code) == (status, code)
                assert raised.value.details() == detail.message
            running = asyncio.create_task(generate(served, chat("a", max_tokens=2000)))
            await until(lambda: _is_running(served))
            waiting = asyncio.create_task(generate(served, chat("b", max_tokens=2000)))
            await until(lambda: _is_waiting(served))
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await generate(served, chat("c"))
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # the only tenant's share is the queue
            for task in (running, waiting):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await until(served.is_idle)

    run(test())


async def _is_waiting(served: Engine) -> bool:
    return (await served.stats()).waiting > 0


async def _is_running(served: Engine) -> bool:
    return (await served.stats()).running > 0


@pytest.mark.parametrize("way", ["deadline", "cancel"])
def test_a_call_that_ends_early_is_aborted(directory: Path, way: str) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.003) as served:
            call: Any = served.stub.Generate(chat("a", max_tokens=2000), timeout=0.3 if way == "deadline" else None)
            reply = Reply()
            try:
                async for event in call:
                    reply.hear(event)
                    if way == "cancel" and len(reply.ids) > 5:
                        call.cancel()
            except (grpc.aio.AioRpcError, asyncio.CancelledError):
                pass
            expected = grpc.StatusCode.DEADLINE_EXCEEDED if way == "deadline" else grpc.StatusCode.CANCELLED
            assert await call.code() is expected
            assert not reply.ended
            await until(served.is_idle)

    run(test())


def test_a_failed_request_is_an_internal_error(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, wait=False) as probe:
            (poison,) = set(probe.tokenizer.encode("\x07"))
        async with engine(directory, "--poison", poison) as served:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await generate(served, chat("\x07"))
            assert raised.value.code() is grpc.StatusCode.INTERNAL
            assert detail_of(raised.value).code == pb.ERROR_INTERNAL

    run(test())


def test_count_tokens(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            count = served.stub.CountTokens
            for text in ("Hello", "Hello <|im_end|>", "word " * 700):
                request = pb.CountTokensRequest(model="m0", chat=chat(text).chat)
                expected = len(served.template.encode([Message("user", text)]))
                assert (await count(request)).prompt_tokens == expected
                request = pb.CountTokensRequest(model="m0", text=text)
                assert (await count(request)).prompt_tokens == len(served.tokenizer.encode_text(text))
            for request, code in (
                (pb.CountTokensRequest(model="m9", text="a"), pb.ERROR_NOT_FOUND),
                (pb.CountTokensRequest(model="m0"), pb.ERROR_INVALID),
                (pb.CountTokensRequest(model="m0", text="xyzzy qwop " * 100_000), pb.ERROR_CONTEXT_LENGTH),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await count(request)
                assert detail_of(raised.value).code == code

    run(test())


def test_models_and_stats(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.002) as served:
            (model,) = await served.models()
            assert model == pb.ModelInfo(
                name="m0",
                state=pb.MODEL_READY,
                revision="revision-0",
                context_window=CONTEXT_WINDOW,
                max_output_tokens=MAX_OUTPUT_TOKENS,
                deterministic=True,
            )
            session = await SessionClient(served.stub).hello()
            reply = await session.end(await session.submit(1, chat("Hello", max_tokens=25)))
            assert reply.finished is not None
            await until(served.is_idle)
            stats = await served.stats()
            assert stats.steps >= 25
            assert stats.pages_total == stats.pages_free + stats.pages_cached + stats.pages_used > 0
            assert stats.page_bytes > 0
            assert stats.core_pid == served.backend.stats().core_pid > 0
            assert stats.uptime_s > 0
            assert not stats.draining
            (of_model,) = stats.models
            assert (of_model.name, of_model.output_tokens) == ("m0", 25)
            assert of_model.prompt_tokens == reply.finished.prompt_tokens

    run(test())


def test_health_follows_the_models(directory: Path, tmp_path: Path) -> None:
    async def status(served: Engine, service: str) -> Any:
        stub = health_pb2_grpc.HealthStub(served.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status

    async def test() -> None:
        async with engine(directory, "--load-s", 0.4, wait=False) as served:
            for service in ("", SERVICE_NAME):
                assert await status(served, service) == NOT_SERVING
            assert [model.state for model in await served.models()] == [pb.MODEL_LOADING]
            watch = health_pb2_grpc.HealthStub(served.channel).Watch(
                health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            )
            seen = []
            async for response in watch:
                seen.append(response.status)
                if response.status == SERVING:
                    break
            watch.cancel()
            assert seen == [NOT_SERVING, SERVING]
            assert await status(served, "") == SERVING
            await served.server.drain()
            assert await status(served, SERVICE_NAME) == NOT_SERVING
        reason = tmp_path / "reason"
        reason.write_text("no.")
        async with engine(directory, "--fail-load", reason, wait=False) as served:

            async def failed() -> bool:
                return (await served.models())[0].state == pb.MODEL_FAILED

            await until(failed)
            assert await status(served, SERVICE_NAME) == NOT_SERVING

    run(test())


def test_a_tokenizer_that_cannot_be_served_fails_its_model(directory: Path, tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        async with engine(directory, wait=False, served_directory=tmp_path) as served:

            async def failed() -> bool:
                return (await served.models())[0].state == pb.MODEL_FAILED

            await until(failed)
            assert "is not a tokenizer" in (await served.models())[0].message

    run(test())


def test_reflection_on_loopback(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, wait=False) as served:
            stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
            call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            async for response in call:
                names = {service.name for service in response.list_services_response.service}
                assert {SERVICE_NAME, "grpc.health.v1.Health"} <= names

    run(test())


def test_messages_of_32_mib_are_taken(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            large = pb.CountTokensRequest(model="m0", text="xyzzy qwop" * (32 << 20 >> 3))
            large.text = large.text[: 32 << 20]
            options = (("grpc.max_send_message_length", -1),)
            async with grpc.aio.insecure_channel(served.address, options=options) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await EngineStub(channel).CountTokens(large)
                assert detail_of(raised.value).code == pb.ERROR_CONTEXT_LENGTH
                large.text = "x" * MAX_MESSAGE_BYTES
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await EngineStub(channel).CountTokens(large)
                assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(test())
