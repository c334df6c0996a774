"""The session's rules, over a real socket and a real scheduler."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from support.engine_server import Reply, SessionClient, chat, engine, run, status_of, until

from aiexport_edge.engine.server.outbox import OutboxBound
from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub

SMALL_WINDOW = (
    ("grpc.http2.bdp_probe", 0),  # the window stays
    ("grpc.http2.lookahead_bytes", 1024),
    ("grpc.use_local_subchannel_pool", 1),
)
DEAF = "The session does not read what the engine sends; connect again and read on."


def test_a_request_from_submit_to_finished(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            session = await SessionClient(served.stub).hello()
            request = chat("Hello!", max_tokens=50)
            reply = await session.end(await session.submit(7, request))
            expected = served.expected(request, 50)
            assert reply.accepted is not None
            assert reply.finished is not None
            assert reply.ids == expected
            assert reply.text == served.text(expected)
            assert reply.emitted_bytes == len(reply.text.encode())
            assert reply.accepted.max_tokens == 50
            assert reply.accepted.model_revision == "revision-0"
            assert reply.started is not None
            finished = reply.finished
            assert finished.reason == pb.FINISH_MAX_TOKENS
            assert (finished.prompt_tokens, finished.output_tokens) == (reply.accepted.prompt_tokens, 50)
            assert (await served.stats()).sessions == 1

    run(test())


def test_many_requests_share_messages(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.002) as served:
            session = await SessionClient(served.stub).hello()
            requests = [chat(f"Number {tag}", max_tokens=40 + tag) for tag in range(16)]
            replies = [await session.submit(tag, request) for tag, request in enumerate(requests)]
            for tag, reply in enumerate(replies):
                await session.end(reply)
                assert reply.ids == served.expected(requests[tag], 40 + tag)
            # One message a step and a few for what comes between steps, not one for each of 760 tokens.
            assert session.num_messages < 150

    run(test())


def test_an_abort_is_answered_and_frees_the_pages(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.002) as served:
            session = await SessionClient(served.stub).hello()
            reply = await session.submit(1, chat("Hello!", max_tokens=2000))
            await session.wait(lambda: reply.output_tokens >= 5)
            await session.abort(1)
            await session.abort(2)  # nobody: ignored
            await session.end(reply)
            assert reply.finished is not None
            assert reply.finished.reason == pb.FINISH_ABORTED
            assert reply.finished.output_tokens == len(reply.ids)
            await until(served.is_idle)
            await session.abort(1)  # has ended: ignored
            again = await session.end(await session.submit(1, chat("Hello again!", max_tokens=3)))  # a tag used before
            assert again.finished is not None

    run(test())


def test_an_abort_of_a_prompt_that_is_still_tokenized(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory) as served:
            session = await SessionClient(served.stub).hello()
            reply = await session.submit(1, chat("word " * 600, max_tokens=10))
            await session.abort(1)
            await session.end(reply)
            assert reply.accepted is not None
            assert reply.finished is not None
            assert reply.finished.reason == pb.FINISH_ABORTED
            assert reply.finished.output_tokens == 0

    run(test())


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_the_end_of_a_session_aborts_its_requests(directory: Path, way: str) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.002) as served:
            async with grpc.aio.insecure_channel(served.address) as channel:
                session = await SessionClient(EngineStub(channel)).hello()
                replies = [await session.submit(tag, chat(f"{tag}", max_tokens=2000)) for tag in range(4)]
                await session.wait(lambda: all(reply.output_tokens for reply in replies))
                if way == "cancel":
                    session.cancel()
            await until(lambda: served.is_idle(sessions=0))

    run(test())


def test_a_client_that_closes_its_side_gets_the_rest(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.001) as served:
            session = await SessionClient(served.stub).hello()
            reply = await session.submit(1, chat("Hello!", max_tokens=30))
            await session.call.done_writing()
            await session.end(reply)
            assert len(reply.ids) == 30
            assert await session.status() == (grpc.StatusCode.OK, "")

    run(test())


@pytest.mark.parametrize(
    ("events", "sentence"),
    [
        ([pb.ClientEvent(abort=pb.Abort(tag=1))], "first event"),
        ([pb.ClientEvent(submit=pb.Submit(tag=1))], "first event"),
        ([pb.ClientEvent()], "first event"),
        ([pb.ClientEvent(hello=pb.Hello()), pb.ClientEvent(hello=pb.Hello())], "one Hello"),
        ([pb.ClientEvent(hello=pb.Hello()), pb.ClientEvent()], "Submit or an Abort"),
        (
            [
                pb.ClientEvent(hello=pb.Hello()),
                pb.ClientEvent(submit=pb.Submit(tag=1, request=chat("a", max_tokens=2000))),
                pb.ClientEvent(submit=pb.Submit(tag=1, request=chat("b", max_tokens=2000))),
            ],
            "tag 1 is in use",
        ),
    ],
)
def test_broken_rules_end_the_session(directory: Path, events: list[pb.ClientEvent], sentence: str) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.002) as served:
            call = served.stub.Session()
            for event in events:
                await call.write(event)
            code, details = await status_of(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert sentence in details
            await until(served.is_idle)

    run(test())


def test_a_session_that_does_not_read_is_dropped_and_others_go_on(directory: Path) -> None:
    async def test() -> None:
        async with (
            engine(directory, outbox=OutboxBound(max_bytes=20_000)) as served,
            grpc.aio.insecure_channel(served.address, options=SMALL_WINDOW) as channel,
        ):
            deaf = await SessionClient(EngineStub(channel)).hello(read=False)
            hearing = await SessionClient(served.stub).hello()
            reply = await hearing.submit(1, chat("I read", max_tokens=1500))
            for tag in range(30):
                await deaf.submit(tag, chat(f"I do not {tag}", max_tokens=2000, tenant=pb.Tenant(id=f"{tag}")))
            await hearing.end(reply)
            assert len(reply.ids) == 1500
            await until(served.is_idle)  # nobody waits for the deaf one
            assert await deaf.status() == (grpc.StatusCode.RESOURCE_EXHAUSTED, DEAF)

    run(test())


def progressed(replies: list[Reply]) -> Callable[[], bool]:
    """A condition: each reply has had some more tokens than now."""
    goals = [len(reply.ids) + 3 for reply in replies]
    return lambda: all(len(reply.ids) >= goal for reply, goal in zip(replies, goals, strict=True))


def test_sixteen_streams_outlive_ten_kills_of_the_core(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.004) as served:
            session = await SessionClient(served.stub).hello()
            requests = [chat(f"Stream {tag}", max_tokens=400) for tag in range(16)]
            replies = [await session.submit(tag, request) for tag, request in enumerate(requests)]
            for kill in range(10):
                await session.wait(progressed(replies))
                os.kill(served.backend.stats().core_pid, signal.SIGKILL)
                await until(lambda kill=kill: served.backend.stats().core_restarts > kill)
            for tag, reply in enumerate(replies):
                await session.end(reply)
                assert reply.ids == served.expected(requests[tag], 400)
                assert reply.text == served.text(reply.ids)
                assert reply.finished is not None
                assert reply.finished.output_tokens == 400
            assert (await served.stats()).core_restarts == 10

    run(test())


def test_a_poison_request_fails_and_the_others_go_on(directory: Path) -> None:
    async def test() -> None:
        poison = "\x07"
        async with engine(directory, wait=False) as probe:
            (poison_id,) = set(probe.tokenizer.encode(poison))
        async with engine(directory, "--step-s", 0.004, "--poison", poison_id) as served:
            session = await SessionClient(served.stub).hello()
            requests = [chat(f"Stream {tag}", max_tokens=60) for tag in range(4)]
            replies = [await session.submit(tag, request) for tag, request in enumerate(requests)]
            await session.wait(lambda: all(reply.ids for reply in replies))
            bad = await session.end(await session.submit(99, chat(f"a{poison}b")))
            assert bad.failed is not None
            assert bad.failed.code == pb.ERROR_INTERNAL
            for tag, reply in enumerate(replies):
                await session.end(reply)
                assert reply.ids == served.expected(requests[tag], 60)

    run(test())


def test_draining(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.002) as served:
            session = await SessionClient(served.stub).hello()
            reply = await session.submit(1, chat("Hello!", max_tokens=100))
            await session.wait(lambda: reply.ids)
            assert not session.draining
            draining = asyncio.create_task(served.server.drain())
            await session.wait(lambda: session.draining)
            refused = await session.end(await session.submit(2, chat("More?")))
            assert refused.refused is not None
            assert refused.refused.code == pb.ERROR_QUEUE_FULL
            assert "draining" in refused.refused.message
            late = await SessionClient(served.stub).hello()
            await late.wait(lambda: late.draining)
            await session.end(reply)
            assert len(reply.ids) == 100
            await draining

    run(test())


def test_draining_has_an_end(directory: Path) -> None:
    async def test() -> None:
        async with engine(directory, "--step-s", 0.002, drain_s=0.1) as served:
            session = await SessionClient(served.stub).hello()
            reply = await session.submit(1, chat("Hello!", max_tokens=2000))
            await session.wait(lambda: reply.ids)
            await served.server.drain()
            assert not reply.ended

    run(test())
