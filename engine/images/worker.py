"""A process that decodes pictures for the engine: `python -m aiexport_edge.engine.images.worker --fd N …`.

Owns what a hostile file can do harm to, and nothing else: it may take so much memory and no more, writes no files, and
is ended by its parent where it takes too long. A question has two parts, a `Job` and the file; an answer a `Decoded`
and the pixels, or a `Failed` alone. The structs travel as msgpack.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import struct
from typing import TypeAlias

import msgspec

from aiexport_edge.engine.images.limits import ImageError, ImageLimits
from aiexport_edge.engine.images.patches import PatchConfig
from aiexport_edge.engine.workers import serve
from aiexport_edge.proto.lifetime import die_with_parent

_BYTES_A_PIXEL = 16  # measured over modes and formats: RGBA with its background, 16 bits a channel, a turn by EXIF
_SLACK_BYTES = 96 << 20  # what decoders and metadata take beside pixels


class Job(msgspec.Struct, frozen=True, array_like=True):
    """What to make of a file."""

    media_type: str
    limits: ImageLimits
    patches: PatchConfig


class Decoded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A grid of rows x columns patches; `digest` is BLAKE2b over it and the pixels."""

    rows: int
    columns: int
    digest: bytes


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Why the file is no picture for this model."""

    message: str


Answer: TypeAlias = Decoded | Failed


def main() -> int:
    """Serves until its parent is gone."""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--max-bytes", type=int, required=True)
    parser.add_argument("--max-pixels", type=int, required=True)
    arguments = parser.parse_args()
    from aiexport_edge.engine.images.decode import decode
    from aiexport_edge.engine.images.resize import resize

    jobs = msgspec.msgpack.Decoder(Job)

    def answer(question: list[bytes]) -> list[bytes]:
        body, file = question
        job = jobs.decode(body)
        try:
            image = resize(decode(file, job.media_type, job.limits), job.patches)
        except ImageError as error:
            return [msgspec.msgpack.encode(Failed(str(error)))]
        size = job.patches.patch_size
        rows, columns = image.height // size, image.width // size
        raw = image.tobytes()
        digest = hashlib.blake2b(struct.pack("<II", rows, columns), digest_size=32)
        digest.update(raw)
        return [msgspec.msgpack.encode(Decoded(rows, columns, digest.digest())), raw]

    # For one file and one picture.
    memory_bytes = _SLACK_BYTES + 3 * arguments.max_bytes + _BYTES_A_PIXEL * arguments.max_pixels
    serve(arguments.fd, answer, memory_bytes=memory_bytes)
    return 0


if __name__ == "__main__":
    os._exit(main())
