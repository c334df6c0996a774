"""Hands the pictures of a request to an engine, before the request itself, on a call of their own.

So megabytes never stand before the aborts and submissions of others. The engine keeps what it has taken for as long as
the call is open; which is until it has answered the request. A request that goes on at another engine is uploaded anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines.generation import Generation, Refused, SessionLost
from aiexport_edge.shim.errors import ApiError, InvalidRequest
from aiexport_edge.shim.images.sources import ImageData

CHUNK_BYTES = 128 << 10  # from 256 KiB on each copy would be mapped and given back on its own: ten times the work
_DETAIL_TRAILER = "aiexport-error-detail-bin"  # as proto/engine.proto names it


class ImageRefused(Refused):
    """The engine refused one of the pictures; `path` is where its block stands."""

    def __init__(self, detail: pb.ErrorDetail, path: str) -> None:
        super().__init__(detail)
        self._path = path

    def error(self) -> ApiError:
        if self.detail.code == pb.ERROR_INVALID:
            return InvalidRequest(f"{self._path}: {self.detail.message}", param=self._path)
        return super().error()


@asynccontextmanager
async def uploaded(stub: Any, metadata: Any, generation: Generation) -> AsyncIterator[None]:
    """Around the submission of a request: its image blocks name what the engine has.

    Raises `Refused`, and `SessionLost` where the engine is gone.
    """
    call = stub.UploadImages(metadata=metadata)
    try:
        try:
            answer = await _send(call, generation.request.model, generation.images)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await _why(call, generation.images) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise SessionLost from None  # the channel was closed
        generation.name_images([image.id for image in answer.images])
        yield
    finally:
        call.cancel()


async def _send(call: Any, model: str, images: Sequence[ImageData]) -> pb.UploadedImages:
    await call.write(pb.UploadEvent(model=model))
    for image in images:
        await call.write(pb.UploadEvent(header=pb.ImageHeader(media_type=image.media_type, num_bytes=len(image.data))))
        for start in range(0, len(image.data), CHUNK_BYTES):
            await call.write(pb.UploadEvent(chunk=image.data[start : start + CHUNK_BYTES]))
    await call.write(pb.UploadEvent(end=pb.UploadEnd()))
    answer = await call.read()
    if answer is grpc.aio.EOF:  # type: ignore[attr-defined]
        raise asyncio.InvalidStateError
    uploaded: pb.UploadedImages = answer
    return uploaded


async def _why(call: Any, images: Sequence[ImageData]) -> Exception:
    """What the engine has said of its refusal."""
    trailers = dict(await call.trailing_metadata() or ())
    raw = trailers.get(_DETAIL_TRAILER)
    if raw is None:
        return SessionLost()
    detail = pb.ErrorDetail.FromString(raw)
    name, _, index = detail.field.partition(".")
    if name == "images" and index.isdigit() and int(index) < len(images):
        return ImageRefused(detail, images[int(index)].path)
    return Refused(detail)
