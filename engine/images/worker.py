"""A process that decodes pictures for the engine: `python -m aiexport_edge.engine.images.worker --fd N …`.

Owns what a hostile file can do harm to, and nothing else: it may take so much memory and no more, writes no files, and
is ended by its parent where it takes too long. A job is a `Job` and the file after it, an answer a `Decoded` and the
pixels after it, or a `Failed`; each struct as msgpack behind its length. It ends when its socket does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import socket
import struct
from typing import TypeAlias

import msgspec

from aiexport_edge.engine.images.limits import ImageError, ImageLimits
from aiexport_edge.engine.images.patches import PatchConfig
from aiexport_edge.proto.lifetime import die_with_parent

LENGTH = struct.Struct("<I")
NICENESS = 10  # decoding can wait: the replies of others come first
_BYTES_A_PIXEL = 16  # measured over modes and formats: RGBA with its background, 16 bits a channel, a turn by EXIF
_SLACK_BYTES = 96 << 20  # what decoders and metadata take beside pixels


class Job(msgspec.Struct, frozen=True, array_like=True):
    """`num_bytes` of a file follow."""

    media_type: str
    num_bytes: int
    limits: ImageLimits
    patches: PatchConfig


class Decoded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A grid of rows x columns patches; `digest` is BLAKE2b over it and the pixels, of which `num_bytes` follow."""

    rows: int
    columns: int
    digest: bytes
    num_bytes: int


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Why the file is no picture for this model."""

    message: str


Answer: TypeAlias = Decoded | Failed


def main() -> int:
    """Serves jobs until the socket ends."""
    die_with_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--max-bytes", type=int, required=True)
    parser.add_argument("--max-pixels", type=int, required=True)
    arguments = parser.parse_args()
    sock = socket.socket(fileno=arguments.fd)
    from aiexport_edge.engine.images.decode import decode
    from aiexport_edge.engine.images.resize import resize

    os.nice(NICENESS)
    _limit(arguments.max_bytes, arguments.max_pixels)
    jobs = msgspec.msgpack.Decoder(Job)
    while (head := _receive(sock, LENGTH.size)) is not None:
        body = _receive(sock, LENGTH.unpack(head)[0])
        if body is None:
            break
        job = jobs.decode(body)
        file = _receive(sock, job.num_bytes)
        if file is None:
            break
        try:
            image = resize(decode(file, job.media_type, job.limits), job.patches)
        except ImageError as error:
            _send(sock, Failed(str(error)))
            continue
        size = job.patches.patch_size
        rows, columns = image.height // size, image.width // size
        raw = image.tobytes()
        del file, image
        digest = hashlib.blake2b(struct.pack("<II", rows, columns), digest_size=32)
        digest.update(raw)
        _send(sock, Decoded(rows, columns, digest.digest(), len(raw)), raw)
        del raw
    return 0


def _limit(max_bytes: int, max_pixels: int) -> None:
    """Address space for what is loaded, one file and one picture; no files to write, no core dumps."""
    with open("/proc/self/statm") as statm:
        loaded = int(statm.read().split()[0]) * resource.getpagesize()
    most = loaded + _SLACK_BYTES + 3 * max_bytes + _BYTES_A_PIXEL * max_pixels
    for what, value in ((resource.RLIMIT_AS, most), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (value, value))


def _receive(sock: socket.socket, num_bytes: int) -> bytes | None:
    """None where the socket has ended."""
    data = sock.recv(num_bytes, socket.MSG_WAITALL) if num_bytes else b""
    return data if len(data) == num_bytes else None


def _send(sock: socket.socket, answer: Answer, after: bytes = b"") -> None:
    body = msgspec.msgpack.encode(answer)
    sock.sendall(LENGTH.pack(len(body)) + body)
    if after:
        sock.sendall(after)


if __name__ == "__main__":
    os._exit(main())
