"""A name for what a model directory holds, so that cached prefixes and resumed streams never cross two models.

Imports no torch: the engine process computes it before a core exists.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from aiexport_edge.engine.models.config import ModelError, Yarn

# Everything beside the weights that decides what comes out for a given conversation.
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)
WHOLE_BYTES = 16 << 20  # weights up to here are read whole, 10 ms
SAMPLE_BLOCKS, BLOCK_BYTES = 256, 4096
LONGEST_HEADER = 100_000_000  # safetensors' own limit


def model_revision(
    directory: Path | str, *, quantize: str = "none", kv_cache_dtype: str = "auto", yarn: Yarn | None = None
) -> str:
    """32 hexadecimal digits that change with the directory's configuration, tokenizer, template or weights.

    Reading gigabytes at each start would take too long. The small files are hashed whole, and so are weight files of
    up to 16 MiB; of a larger one its size, its header (every tensor's name, dtype, shape and place) and 256 blocks of
    4 KiB spread evenly from the first byte to the last. Training or merging changes nearly every block, so this tells
    versions of a model apart; it is no defence against someone who alters single weights on purpose. `quantize`, what
    the weights are rounded to when they are loaded, `kv_cache_dtype` and `yarn` count too: the same prompt has other
    keys and values then. Where the directory lies and when its files were written do not count. Raises ModelError where
    a file cannot be read.
    """
    directory = Path(directory)
    digest = hashlib.blake2b(digest_size=16)
    try:
        for name in SMALL_FILES:
            file = directory / name
            if file.exists():
                _add(digest, name, file.read_bytes())
        if quantize != "none":
            _add(digest, "quantize", quantize.encode())
        if kv_cache_dtype != "auto":
            _add(digest, "kv_cache_dtype", kv_cache_dtype.encode())
        if yarn is not None:
            _add(digest, "yarn", f"{yarn.factor!r} {yarn.original}".encode())
        for file in sorted(directory.glob("*.safetensors")):
            with file.open("rb") as stream:
                _add(digest, file.name, _sample(stream, file.stat().st_size))
    except OSError as error:
        raise ModelError(f"{error.filename} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, name: str, content: bytes) -> None:
    """Name and content, each with its length before it, so that no two lists of files run into the same bytes."""
    for field in (name.encode(), content):
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)


def _sample(stream: BinaryIO, size: int) -> bytes:
    if size <= WHOLE_BYTES:
        return stream.read()
    header_bytes = min(int.from_bytes(stream.read(8), "little"), LONGEST_HEADER)
    parts = [size.to_bytes(8, "little"), stream.read(header_bytes)]
    for index in range(SAMPLE_BLOCKS):
        stream.seek((size - BLOCK_BYTES) * index // (SAMPLE_BLOCKS - 1))
        parts.append(stream.read(BLOCK_BYTES))
    return b"".join(parts)
