"""Pictures over gRPC: uploads, what is refused of them, and that nothing of them is left when nobody needs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from support.engine_server import Engine, Reply, SessionClient, engine, run, until
from support.scripted_core import undisturbed
from support.seeing import plain, save_text

from aiexport_edge.engine.images.limits import ImageLimits
from aiexport_edge.engine.images.preprocessor import load_patch_config
from aiexport_edge.engine.models.facts import Vision
from aiexport_edge.engine.server.errors import DETAIL_TRAILER
from aiexport_edge.engine.server.process import ImageConfig
from aiexport_edge.engine.text.template import ChatTemplate, Message, Picture
from aiexport_edge.engine.text.tokenizer import Tokenizer
from aiexport_edge.proto import engine_pb2 as pb

PICTURE = plain("red", (24, 16))  # 4 x 6 patches: 6 tokens
TOKENS = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seeing")
    save_text(path)
    return path


@asynccontextmanager
async def seeing(directory: Path, *core_options: object, **images: Any) -> AsyncIterator[Engine]:
    image_id = Tokenizer.load(directory).control_tokens["<|image_pad|>"]
    vision = Vision(load_patch_config(directory), image_id)
    config = ImageConfig(**{"timeout_s": 120.0, **images})
    async with engine(directory, *core_options, vision=vision, images=config) as served:
        yield served


def used_bytes(served: Engine) -> int:
    return served.server._generations.pictures.used_bytes


def events_of(pictures: Sequence[bytes], *, media_type: str = "image/png", end: bool = True) -> list[pb.UploadEvent]:
    events = [pb.UploadEvent(model="m0")]
    for data in pictures:
        events.append(pb.UploadEvent(header=pb.ImageHeader(media_type=media_type, num_bytes=len(data))))
        events += [pb.UploadEvent(chunk=data[start : start + 50]) for start in range(0, len(data), 50)]
    return [*events, pb.UploadEvent(end=pb.UploadEnd())] if end else events


@asynccontextmanager
async def uploaded(served: Engine, events: Sequence[pb.UploadEvent]) -> AsyncIterator[pb.UploadedImages]:
    call: Any = served.stub.UploadImages()
    try:
        for event in events:
            await call.write(event)
        answer = await call.read()
        assert answer is not grpc.aio.EOF, await call.details()  # type: ignore[attr-defined]
        yield answer
    finally:
        call.cancel()


async def refusal(served: Engine, events: Sequence[pb.UploadEvent]) -> tuple[grpc.StatusCode, pb.ErrorDetail]:
    """What an upload that comes to nothing is told."""
    call: Any = served.stub.UploadImages(iter(events))
    code = await call.code()
    trailers = dict(await call.trailing_metadata() or ())
    return code, pb.ErrorDetail.FromString(trailers.get(DETAIL_TRAILER, b""))


def asking(*content: str | pb.Image, max_tokens: int = 12) -> pb.GenerateRequest:
    blocks = [pb.ContentBlock(text=part) if isinstance(part, str) else pb.ContentBlock(image=part) for part in content]
    chat = pb.Chat(messages=[pb.Message(role=pb.ROLE_USER, content=blocks)])
    return pb.GenerateRequest(model="m0", chat=chat, max_tokens=max_tokens, sampling=pb.SamplingParams(ignore_eos=True))


async def generate(served: Engine, request: pb.GenerateRequest) -> Reply:
    reply = Reply()
    async for event in served.stub.Generate(request):
        reply.hear(event)
    return reply


def expected(directory: Path, *content: str | Picture, num_tokens: int = 12) -> list[int]:
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, tokenizer, image_token_id=tokenizer.control_tokens["<|image_pad|>"])
    return undisturbed(template.encode([Message("user", content)]), num_tokens)


def test_a_request_sees_what_was_uploaded_and_lets_it_go(directory: Path) -> None:
    async def test() -> None:
        async with seeing(directory) as served:
            assert (await served.models())[0].vision
            other = plain("blue", (40, 40))
            async with uploaded(served, events_of([PICTURE, other])) as answer:
                first, second = answer.images
                assert (first.prompt_tokens, second.prompt_tokens) == (TOKENS, 25)
                content = ("a", pb.Image(upload_id=first.id), "b", pb.Image(upload_id=second.id))
                request = asking(*content)
                count = pb.CountTokensRequest(model="m0", chat=request.chat)
                counted = (await served.stub.CountTokens(count)).prompt_tokens
                reply = await generate(served, request)
                assert reply.accepted is not None
                assert reply.accepted.prompt_tokens == counted
                assert reply.ids == expected(directory, "a", Picture(TOKENS), "b", Picture(25))
                assert used_bytes(served) > 0
            await until(lambda: used_bytes(served) == 0)
            with pytest.raises(grpc.aio.AioRpcError, match="no such upload"):
                await generate(served, request)

    run(test())


def _accepted(reply: Reply) -> bool:
    return reply.accepted is not None


def _running(reply: Reply) -> bool:
    return len(reply.ids) > 3


def test_a_request_holds_its_pictures_past_the_call(directory: Path) -> None:
    """Long and short prompts alike; the session's end drops them."""

    async def test() -> None:
        async with seeing(directory, "--step-s", 0.01) as served:
            client = await SessionClient(served.stub).hello()
            for tag, text in enumerate(("short", "long " * 900)):
                async with uploaded(served, events_of([PICTURE])) as answer:
                    request = asking(pb.Image(upload_id=answer.images[0].id), text, max_tokens=2000)
                    reply = await client.submit(tag, request)
                    if tag == 0:
                        await client.wait(partial(_accepted, reply))
                await client.wait(partial(_running, reply))
            assert used_bytes(served) == 2 * TOKENS * 4 * 16 * 3
            await client.abort(0)
            await until(lambda: used_bytes(served) == TOKENS * 4 * 16 * 3)
            client.cancel()
            await until(lambda: used_bytes(served) == 0)

    run(test())


def test_pictures_within_the_request(directory: Path) -> None:
    async def test() -> None:
        async with seeing(directory) as served:
            inline = pb.Image(data=PICTURE, media_type="image/png")
            reply = await generate(served, asking("a", inline))
            assert reply.ids == expected(directory, "a", Picture(TOKENS))
            await until(lambda: used_bytes(served) == 0)
            for image, said in (
                (pb.Image(data=PICTURE[:40], media_type="image/png"), "broken"),
                (pb.Image(data=PICTURE, media_type="image/gif"), "not image/gif"),
                (pb.Image(data=PICTURE), "media type must be one of"),
                (pb.Image(), "upload_id or data"),
                (pb.Image(data=bytes(11 << 20), media_type="image/png"), "at most 10485760"),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match=said) as raised:
                    await generate(served, asking("a", inline, image))
                trailers: Any = raised.value.trailing_metadata()
                detail = pb.ErrorDetail.FromString(dict(trailers)[DETAIL_TRAILER])
                assert detail.field == "chat.messages.0.content.2.image"
            assert used_bytes(served) == 0

    run(test())


def test_what_an_upload_may_not_be(directory: Path) -> None:
    async def test() -> None:
        limits = ImageLimits(max_bytes=2000, max_pixels=10_000)
        async with seeing(directory, limits=limits, max_count=2, held_bytes=6000) as served:
            header = pb.UploadEvent(header=pb.ImageHeader(media_type="image/png", num_bytes=100))
            chunk = pb.UploadEvent(chunk=b"x" * 50)
            model, *rest = events_of([PICTURE])
            cases: list[tuple[list[pb.UploadEvent], str, str]] = [
                (events_of([PICTURE, PICTURE[:50]]), "images.1", "broken"),
                (events_of([PICTURE], media_type="image/jpeg"), "images.0", "not image/jpeg"),
                (events_of([PICTURE, plain("red", (200, 60))]), "images.1", "200 x 60 pixels; at most 10000"),
                (events_of([bytes(2001)]), "images.0", "at most 2000"),
                (events_of([PICTURE] * 3), "images.2", "at most 2 images"),
                (events_of([b""]), "images.0", "not a PNG"),
                (events_of([PICTURE], end=False), "event", "ends by `end`"),
                (rest, "event", "is a model"),
                ([], "event", "is a model"),
                ([model, chunk], "event", "then headers"),
                ([model, header, header], "event", "is a chunk"),
                ([model, header, chunk], "event", "is a chunk"),
                ([model, header, chunk, chunk, chunk], "event", "then headers"),
                ([model, header, pb.UploadEvent(chunk=b"")], "images.0", "A chunk has"),
                ([model, header, pb.UploadEvent(chunk=b"x" * 101)], "images.0", "A chunk has"),
                ([pb.UploadEvent(model="m9")], "model", "no model 'm9'"),
            ]
            for events, field, said in cases:
                code, detail = await refusal(served, events)
                wanted = grpc.StatusCode.NOT_FOUND if field == "model" else grpc.StatusCode.INVALID_ARGUMENT
                assert (code, detail.field) == (wanted, field), detail
                assert said in detail.message
            await until(lambda: used_bytes(served) == 0)

    run(test())


def test_there_is_an_end_to_what_is_held(directory: Path) -> None:
    async def test() -> None:
        size = TOKENS * 4 * 16 * 3
        room = 3 * size + 3 * len(PICTURE)  # too little for a fourth and its file
        async with seeing(directory, held_bytes=room) as served:
            async with uploaded(served, events_of([PICTURE] * 3)):
                assert used_bytes(served) == 3 * size
                code, detail = await refusal(served, events_of([PICTURE]))
                assert (code, detail.code) == (grpc.StatusCode.UNAVAILABLE, pb.ERROR_QUEUE_FULL)
                assert detail.retry_after_ms > 0
            await until(lambda: used_bytes(served) == 0)
            async with uploaded(served, events_of([PICTURE])):
                pass

    run(test())


def test_pixels_count_and_pictures_that_fill_the_context_are_refused(directory: Path) -> None:
    """Small files may stand for many pixels: neither the held bytes nor the context is passed by decoding them."""

    async def test() -> None:
        large = plain("red", (64, 64))  # 64 tokens, 12 KiB of pixels
        async with seeing(directory, held_bytes=30_000) as served:
            code, detail = await refusal(served, events_of([large] * 4))
            assert (code, detail.code) == (grpc.StatusCode.UNAVAILABLE, pb.ERROR_QUEUE_FULL)
            await until(lambda: used_bytes(served) == 0)
        async with seeing(directory, max_count=100) as served:
            code, detail = await refusal(served, events_of([large] * 64))
            assert (code, detail.code) == (grpc.StatusCode.INVALID_ARGUMENT, pb.ERROR_CONTEXT_LENGTH)
            assert (detail.limit, detail.actual) == (4096, 4096)
            await until(lambda: used_bytes(served) == 0)

    run(test())


def test_a_client_that_leaves_in_the_middle_leaves_nothing(directory: Path) -> None:
    async def test() -> None:
        async with seeing(directory) as served:
            for events in (events_of([PICTURE])[:3], events_of([PICTURE], end=False)):
                call: Any = served.stub.UploadImages()
                for event in events:
                    await call.write(event)
                await until(lambda: used_bytes(served) > 0)
                call.cancel()
                await until(lambda: used_bytes(served) == 0)

    run(test())


def test_images_stand_where_a_user_speaks_and_for_models_that_see(directory: Path) -> None:
    async def test() -> None:
        image = pb.ContentBlock(image=pb.Image(data=PICTURE, media_type="image/png"))
        async with seeing(directory) as served:
            request = asking("x")
            request.chat.messages.insert(0, pb.Message(role=pb.ROLE_SYSTEM, content=[image]))
            with pytest.raises(grpc.aio.AioRpcError, match="ROLE_USER"):
                await generate(served, request)
            with pytest.raises(grpc.aio.AioRpcError, match="at most 20 images"):
                await generate(served, asking(*[image.image] * 21))
        async with engine(directory) as blind:
            assert not (await blind.models())[0].vision
            with pytest.raises(grpc.aio.AioRpcError, match="cannot see images"):
                await generate(blind, asking("x", image.image))
            code, detail = await refusal(blind, events_of([PICTURE]))
            assert (code, detail.field) == (grpc.StatusCode.INVALID_ARGUMENT, "images.0")

    run(test())


def test_the_event_loop_goes_on_while_pictures_are_decoded(directory: Path) -> None:
    """Many pictures, one worker: other calls are answered meanwhile."""

    async def test() -> None:
        async with seeing(directory, num_workers=1) as served:
            large = plain("red", (3000, 2000))

            async def see() -> None:
                async with uploaded(served, events_of([large] * 4)):
                    pass

            seers = [asyncio.create_task(see()) for _ in range(2)]
            answered = 0
            while not all(task.done() for task in seers):
                await served.stats()
                answered += 1
            await asyncio.gather(*seers)
            assert answered > 8

    run(test())
