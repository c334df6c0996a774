"""The file `SHA256SUMS` of a model directory: what its files hashed to when it was imported.

Its lines are those of sha256sum(1), so `sha256sum -c SHA256SUMS` checks a directory too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

MANIFEST = "SHA256SUMS"
MAX_BYTES = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]{1,255})")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def render(hashes: Mapping[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def read(directory: Path) -> dict[str, str]:
    """File names to digests; empty where there is no manifest. Raises `ValueError` where it cannot be understood."""
    file = directory / MANIFEST
    if not file.is_file():
        return {}
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} is too long for a list of hashes; remove it, or import the model again")
    hashes: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None or match[2] in ("..", "."):
            raise ValueError(f"{file} is no list of hashes; remove it, or import the model again")
        hashes[match[2]] = match[1]
    return hashes


def first_difference(directory: Path, expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first file that is gone or altered, as a sentence with the remedy."""
    for name, digest in sorted(expected.items()):
        if name not in found:
            return f"{directory / name} is missing, which {MANIFEST} lists; import the model again"
        if found[name] != digest:
            return f"{directory / name} is not what {MANIFEST} says it was; import the model again"
    return None
