"""Pictures of requests in the engine process: taken in by UploadImages or inline, decoded, held while they are needed.

Owns the bytes that are held, of files and of pixels, over all requests, and the names under which what was uploaded is
found. Decoding is done elsewhere (`images/pool.py`); what a picture means in a prompt is the template's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from aiexport_edge.engine.core.protocol import ImageInput
from aiexport_edge.engine.images.limits import ImageError
from aiexport_edge.engine.images.pool import ImagePool, PoolError
from aiexport_edge.engine.models.facts import Vision
from aiexport_edge.engine.server.errors import InvalidRequest, RequestError
from aiexport_edge.engine.server.models import Model
from aiexport_edge.engine.server.prompt import too_long
from aiexport_edge.engine.text.template import Picture
from aiexport_edge.proto import engine_pb2 as pb

MAX_CHUNK_BYTES = 1 << 20
UPLOAD_S = 300.0  # the most that a call of UploadImages lasts
_RETRY_MS = 1000


class HeldPicture:
    """A decoded picture and how many hold it; its bytes count until nobody does."""

    def __init__(self, image: ImageInput, num_tokens: int, on_free: Callable[[int], None]) -> None:
        self.image = image
        self.num_tokens = num_tokens
        self._on_free = on_free
        self._holders = 1

    def hold(self) -> None:
        """One holder more; each calls `release` once."""
        self._holders += 1

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            self._on_free(len(self.image.pixels))

    @property
    def picture(self) -> Picture:
        """What the template is told of it."""
        return Picture(self.num_tokens)


class Pictures:
    """All pictures of this process. `held_bytes` bounds files and pixels together; beside it there is what each worker
    has just decoded.
    """

    def __init__(self, pool: ImagePool, *, held_bytes: int, max_count: int) -> None:
        self.max_count = max_count
        self.used_bytes = 0
        self._pool = pool
        self._held_bytes = held_bytes
        self._uploaded: dict[str, HeldPicture] = {}

    @property
    def max_bytes(self) -> int:
        """Of one file."""
        return self._pool.limits.max_bytes

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()

    @contextlib.contextmanager
    def room(self, num_bytes: int) -> Iterator[None]:
        """Around the time in which a file is held. Raises `RequestError` where there is no room."""
        self._take(num_bytes)
        try:
            yield
        finally:
            self._free(num_bytes)

    async def decode(self, data: bytes | Sequence[bytes], media_type: str, vision: Vision, field: str) -> HeldPicture:
        """A file, whole or in pieces. Raises `RequestError` naming `field`. The caller holds the picture."""
        try:
            pixels = await self._pool.decode(data, media_type, vision.patches)
        except ImageError as error:
            raise InvalidRequest(str(error), field) from None
        except PoolError as error:
            raise RequestError(pb.ERROR_QUEUE_FULL, str(error), field=field, retry_after_ms=_RETRY_MS) from None
        self._take(len(pixels.data))
        image = ImageInput(0, pixels.rows, pixels.columns, pixels.digest, pixels.data)
        return HeldPicture(image, vision.num_tokens(pixels.rows, pixels.columns), self._free)

    def find(self, upload_id: str, field: str) -> HeldPicture:
        """What was uploaded under a name; the caller does not hold it yet. Raises `InvalidRequest`."""
        held = self._uploaded.get(upload_id)
        if held is None:
            raise InvalidRequest("There is no such upload; its call must be open when the request is sent.", field)
        return held

    @contextlib.contextmanager
    def named(self, pictures: Sequence[HeldPicture]) -> Iterator[list[str]]:
        """Gives each a name under which `find` has it for so long."""
        names = [secrets.token_urlsafe(16) for _ in pictures]
        self._uploaded.update(zip(names, pictures, strict=True))
        try:
            yield names
        finally:
            for name in names:
                del self._uploaded[name]

    def _take(self, num_bytes: int) -> None:
        if self.used_bytes + num_bytes > self._held_bytes:
            raise RequestError(
                pb.ERROR_QUEUE_FULL,
                "Too many images are under way just now; try again in a moment.",
                limit=self._held_bytes,
                actual=self.used_bytes + num_bytes,
                retry_after_ms=_RETRY_MS,
            )
        self.used_bytes += num_bytes

    def _free(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes


# ---------------------------------------------------------------------------------------------------- of a request


@dataclass(frozen=True, slots=True)
class ImageBlock:
    """An image block of a chat, and where it stands."""

    image: pb.Image
    field: str


def image_blocks(chat: pb.Chat) -> list[ImageBlock]:
    """The images of a chat in their order. Raises `InvalidRequest` for one that stands outside a user's message."""
    blocks = []
    for index, message in enumerate(chat.messages):
        for place, block in enumerate(message.content):
            if block.WhichOneof("block") == "image":
                field = f"chat.messages.{index}.content.{place}.image"
                if message.role != pb.ROLE_USER:
                    raise InvalidRequest("Images stand in messages of ROLE_USER.", field)
                blocks.append(ImageBlock(block.image, field))
    return blocks


def are_uploaded(blocks: Sequence[ImageBlock]) -> bool:
    """Whether none is still to be decoded."""
    return all(block.image.WhichOneof("source") == "upload_id" for block in blocks)


def check_images(blocks: Sequence[ImageBlock], model: Model, pictures: Pictures) -> None:
    """Everything that can be said without decoding. Raises `InvalidRequest`."""
    if not blocks:
        return
    if model.facts.vision is None:
        raise InvalidRequest(f"{model.facts.name} cannot see images; send text.", blocks[0].field)
    if len(blocks) > pictures.max_count:
        raise InvalidRequest(
            f"A request has at most {pictures.max_count} images.",
            blocks[pictures.max_count].field,
            limit=pictures.max_count,
            actual=len(blocks),
        )
    for block in blocks:
        if block.image.WhichOneof("source") is None:
            raise InvalidRequest("An image has an upload_id or data.", block.field)
        if len(block.image.data) > pictures.max_bytes:
            raise InvalidRequest(
                f"The file has {len(block.image.data)} bytes; at most {pictures.max_bytes} are accepted.",
                block.field,
                limit=pictures.max_bytes,
                actual=len(block.image.data),
            )


def hold_uploaded(blocks: Sequence[ImageBlock], pictures: Pictures) -> list[HeldPicture]:
    """Of blocks that all name uploads: what they name, held. Raises `InvalidRequest`, and then holds nothing."""
    held = [pictures.find(block.image.upload_id, block.field) for block in blocks]
    for picture in held:
        picture.hold()
    return held


async def hold_all(blocks: Sequence[ImageBlock], vision: Vision | None, pictures: Pictures) -> list[HeldPicture]:
    """The same where some have their data with them. Raises `RequestError`, and then holds nothing."""
    held: list[HeldPicture] = []
    try:
        for block in blocks:
            assert vision is not None  # `check_images` has seen to it
            if block.image.WhichOneof("source") == "upload_id":
                held += hold_uploaded([block], pictures)
            else:
                image = block.image
                with pictures.room(len(image.data)):
                    held.append(await pictures.decode(image.data, image.media_type, vision, block.field))
    except BaseException:
        for picture in held:
            picture.release()
        raise
    return held


# ---------------------------------------------------------------------------------------------------- uploads


class UploadEvents:
    """A client's events, one at a time, up to its `end` or the end of its stream."""

    def __init__(self, events: AsyncIterable[pb.UploadEvent]) -> None:
        self._events = aiter(events)
        self._ended = False

    async def next(self) -> pb.UploadEvent | None:
        event = await anext(self._events, None)
        self._ended = event is None or event.WhichOneof("event") == "end"
        return event

    async def expect(self, kind: str) -> pb.UploadEvent:
        """Raises `InvalidRequest` where the next is of another kind."""
        event = await self.next()
        if event is None or event.WhichOneof("event") != kind:
            raise InvalidRequest(f"The next of an upload is a {kind}.", "event")
        return event

    async def drain(self) -> None:
        """Reads on to the end: a call that is ended while its client writes loses the reason on the way."""
        while not self._ended:
            await self.next()


async def receive_images(
    events: UploadEvents, models: Mapping[str, Model], pictures: Pictures, stack: contextlib.ExitStack
) -> pb.UploadedImages:
    """Reads a call of UploadImages up to its `end`, decoding each file while the next one comes. What it returns is
    there until `stack` is closed. Raises `RequestError`.
    """
    model = _seeing(await events.expect("model"), models)
    tasks: list[asyncio.Task[HeldPicture]] = []
    tokens: list[int] = []  # of those that are decoded

    def let_go() -> None:
        for task in tasks:
            task.cancel()
            task.add_done_callback(_release)

    stack.callback(let_go)
    while (event := await events.next()) is not None:
        match event.WhichOneof("event"):
            case "end":
                break
            case "header":
                file = await _receive_file(event.header, events, pictures, len(tasks))
                tasks.append(asyncio.create_task(_decode_file(file, model, pictures, tokens), name="picture"))
                tasks[-1].add_done_callback(file.let_go)
            case _:
                raise InvalidRequest("An upload is a model, then headers with their chunks, then an end.", "event")
    else:
        raise InvalidRequest("An upload ends by `end`.", "event")
    held = [await task for task in tasks]
    names = stack.enter_context(pictures.named(held))
    return pb.UploadedImages(
        images=[
            pb.UploadedImage(id=name, prompt_tokens=picture.num_tokens)
            for name, picture in zip(names, held, strict=True)
        ]
    )


@dataclass(frozen=True, slots=True)
class _File:
    """A file that has come; closing `room` gives back what it holds."""

    chunks: list[bytes]
    media_type: str
    field: str
    room: contextlib.ExitStack

    def let_go(self, _decoded: object) -> None:
        """Its bytes are needed no more."""
        self.room.close()


async def _receive_file(header: pb.ImageHeader, events: UploadEvents, pictures: Pictures, index: int) -> _File:
    """The file after its header."""
    field = f"images.{index}"
    if index >= pictures.max_count:
        raise InvalidRequest(f"A request has at most {pictures.max_count} images.", field, limit=pictures.max_count)
    if header.num_bytes > pictures.max_bytes:
        raise InvalidRequest(
            f"the file has {header.num_bytes} bytes; at most {pictures.max_bytes} are accepted",
            field,
            limit=pictures.max_bytes,
            actual=header.num_bytes,
        )
    with contextlib.ExitStack() as stack:
        stack.enter_context(pictures.room(header.num_bytes))
        chunks: list[bytes] = []
        missing = header.num_bytes
        while missing > 0:
            chunk = (await events.expect("chunk")).chunk
            if not 0 < len(chunk) <= min(missing, MAX_CHUNK_BYTES):
                raise InvalidRequest("A chunk has 1 byte to 1 MiB, and all of a file's num_bytes together.", field)
            chunks.append(chunk)
            missing -= len(chunk)
        return _File(chunks, header.media_type, field, stack.pop_all())


async def _decode_file(file: _File, model: Model, pictures: Pictures, tokens: list[int]) -> HeldPicture:
    """Raises `RequestError`, also where the pictures of an upload, `tokens` with it, can't stand in a prompt."""
    assert model.facts.vision is not None
    held = await pictures.decode(file.chunks, file.media_type, model.facts.vision, file.field)
    file.chunks.clear()
    tokens.append(held.num_tokens)
    if sum(tokens) >= model.context_window:
        held.release()
        raise too_long(model, sum(tokens), f"at least {sum(tokens)}")
    return held


def _seeing(event: pb.UploadEvent, models: Mapping[str, Model]) -> Model:
    model = models.get(event.model)
    if model is None:
        raise RequestError(pb.ERROR_NOT_FOUND, f"There is no model {event.model!r} here.", field="model")
    if model.facts.vision is None:
        raise InvalidRequest(f"{event.model} cannot see images; send text.", "images.0")
    return model


def _release(task: asyncio.Task[HeldPicture]) -> None:
    """Of an upload that is over."""
    if not task.cancelled() and task.exception() is None:
        task.result().release()
