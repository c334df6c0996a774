"""The source of an image block: bytes in the body, or a URL from which they are fetched before the request is sent.

Owns what a source may say, and base64. What the bytes are is the engine's to judge: the shim never decodes a picture.
"""

from __future__ import annotations

import binascii
import re
from dataclasses import dataclass
from typing import TypeAlias

from aiexport_edge.proto.config_images import ImagesConfig
from aiexport_edge.shim.address_policy import AddressPolicy, Forbidden, Target
from aiexport_edge.shim.errors import InvalidRequest
from aiexport_edge.shim.fields import Object, Value
from aiexport_edge.shim.long_strings import LongString

MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif")
# RFC 2397: scheme, type and "base64" in any case, parameters of the type between them.
_DATA_URL = re.compile(r"data:([a-z]+/[a-z.+-]+)(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII | re.IGNORECASE)
_BLANKS = "\r\n\t "
_SLICE_CHARS = 128 << 10  # of base64 that are decoded at one time; between two, other threads run


@dataclass(frozen=True, slots=True)
class ImageData:
    """A picture's file. `path` is where its block stands in the body, for errors."""

    path: str
    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class ImageLink:
    """A picture that is still to be fetched, from a place that the operator may allow."""

    path: str
    target: Target


ImageSource: TypeAlias = ImageData | ImageLink


class ImageRules:
    """What the operator allows of images."""

    def __init__(self, config: ImagesConfig) -> None:
        self.max_bytes = config.max_bytes
        self.max_count = config.max_count
        self.policy = AddressPolicy(config.allow)

    def read(self, block: Value) -> ImageSource:
        """The source of a block of type "image". Raises `InvalidRequest` naming the field."""
        source = block.object().require("source").object()
        if source.require("type").choice("base64", "url") == "base64":
            media_type = source.require("media_type").choice(*MEDIA_TYPES)
            data = source.require("data")
            if isinstance(data.raw, LongString) and not data.raw.head:
                return ImageData(block.path, media_type, self._checked(data, data.raw.data))
            return ImageData(
                block.path, media_type, self._bytes(data, data.raw if isinstance(data.raw, str) else data.text())
            )
        url = source.require("url")
        head = url.raw.head if isinstance(url.raw, LongString) else url.text()
        return self._data_url(block, url) if _scheme(head) == "data" else self._link(block, source)

    def check_count(self, path: str, count: int) -> None:
        """`count` images are there with the one at `path`. Raises `InvalidRequest`."""
        if count > self.max_count:
            raise InvalidRequest(f"{path}: is one image more than the {self.max_count} of a request", param=path)

    def too_large(self, path: str, num_bytes: int) -> InvalidRequest:
        """The error of a file above the limit."""
        said = f"the image has {num_bytes:,} bytes; at most {self.max_bytes:,} are accepted"
        return InvalidRequest(f"{path}: {said}", param=path)

    def _data_url(self, block: Value, url: Value) -> ImageData:
        long = url.raw if isinstance(url.raw, LongString) else None
        text = url.text() if long is None else long.head
        declared = _DATA_URL.match(text)
        if declared is None or (media_type := declared[1].lower()) not in MEDIA_TYPES:
            raise url.wrong(f"a data: URL must be base64 of {', '.join(MEDIA_TYPES)}")
        data = self._bytes(url, text[declared.end() :]) if long is None else self._checked(url, long.data)
        return ImageData(block.path, media_type, data)

    def _link(self, block: Value, source: Object) -> ImageLink:
        url = source.require("url")
        text = url.text()
        if _scheme(text) not in ("http", "https"):
            raise url.wrong("must be an http, https or data URL")
        try:
            return ImageLink(block.path, self.policy.check(text))
        except Forbidden as problem:
            raise url.wrong(f"{problem}; send the image as base64") from None

    def _bytes(self, field: Value, text: str) -> bytes:
        """Base64 (RFC 4648), padded; line breaks and blanks in it do not count, as encoders for mail put them there."""
        if any(blank in text for blank in _BLANKS):
            text = "".join(text.split())
        num_bytes = len(text) // 4 * 3
        if num_bytes - 2 > self.max_bytes:
            raise self.too_large(field.path, num_bytes)
        if not text:
            raise field.wrong("is empty; it must be the base64 of an image")
        try:
            parts = [
                binascii.a2b_base64(text[start : start + _SLICE_CHARS], strict_mode=True)
                for start in range(0, len(text), _SLICE_CHARS)
            ]
        except ValueError:  # binascii.Error is one
            raise field.wrong("is not valid base64 (RFC 4648, with padding)") from None
        return self._checked(field, parts[0] if len(parts) == 1 else b"".join(parts))

    def _checked(self, field: Value, data: bytes) -> bytes:
        if len(data) > self.max_bytes:
            raise self.too_large(field.path, len(data))
        return data


def _scheme(url: str) -> str:
    """What stands before its colon, as far as it is one that is known here."""
    return url[:6].partition(":")[0].lower()
