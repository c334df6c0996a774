"""What an image may be, and what is said of one that is not so. Imports no decoder."""

from __future__ import annotations

from dataclasses import dataclass

FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP", "image/gif": "GIF"}


class ImageError(Exception):
    """What is wrong with an image: a sentence for the client that sent it."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What one image may be: bytes of its file, pixels, and the longer side in pixels."""

    max_bytes: int = 10 << 20
    max_pixels: int = 64_000_000
    max_side: int = 16_384
