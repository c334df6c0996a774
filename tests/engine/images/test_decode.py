"""Image files: the odd, the broken and the mislabelled."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.tiny_models import shared_data

from aiexport_edge.engine.images.decode import decode as decode_image
from aiexport_edge.engine.images.limits import FORMATS, ImageError, ImageLimits

LIMITS = ImageLimits()
SUFFIXES = {".png": "image/png", ".jpg": "image/jpeg"}


def decode(data: bytes, media_type: str, limits: ImageLimits) -> np.ndarray[Any, Any]:
    return np.asarray(decode_image(data, media_type, limits))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right, 40 x 20."""
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    return image.convert(mode)


@pytest.mark.parametrize("media_type", FORMATS)
def test_every_format(media_type: str) -> None:
    pixels = decode(encoded(halves(), FORMATS[media_type]), media_type, LIMITS)
    assert pixels.shape == (20, 40, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[10, 5], [255, 0, 0], atol=12)
    np.testing.assert_allclose(pixels[10, 35], [0, 0, 255], atol=12)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new("I;16", (8, 8), 40_000) if mode == "I;16" else halves(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    pixels = decode(encoded(image, kind), f"image/{kind.lower()}", LIMITS)
    assert pixels.shape[2] == 3
    if mode == "I;16":
        assert pixels[0, 0].tolist() == [40_000 >> 8] * 3


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert decode(encoded(image), "image/png", LIMITS).min() == 255
    indexed = Image.new("P", (4, 4), 0)
    indexed.putpalette([0, 0, 0, 9, 9, 9])
    assert decode(encoded(indexed, transparency=0), "image/png", LIMITS).min() == 255


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_as_pillow_has_it(orientation: int) -> None:
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert expected is not None
    assert decode(data, "image/png", LIMITS).tolist() == np.asarray(expected.convert("RGB")).tolist()


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = decode(encoded(halves(), "JPEG", exif=exif, quality=95), "image/jpeg", LIMITS)
    assert pixels.shape == (40, 20, 3)
    np.testing.assert_allclose(pixels[5, 10], [255, 0, 0], atol=12)


@pytest.mark.parametrize("media_type", ["image/gif", "image/webp", "image/png"])
def test_the_first_frame_stands_for_an_animation(media_type: str) -> None:
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "green", "blue")]
    data = encoded(frames[0], FORMATS[media_type], save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_allclose(decode(data, media_type, LIMITS)[3, 3], [255, 0, 0], atol=3)


def test_a_jpeg_with_another_behind_it_is_a_jpeg() -> None:
    data = encoded(halves(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 20), "green")])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    np.testing.assert_allclose(decode(data, "image/jpeg", LIMITS)[10, 5], [255, 0, 0], atol=12)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """Each goes over the whole picture, and takes a hundred bytes of the file."""
    data = encoded(Image.new("L", (4000, 4000), 128), "JPEG", progressive=True)
    end = data.rfind(b"\xff\xd9")
    scan = data[data.rfind(b"\xff\xda") : end]
    assert decode(data[:end] + scan * 3 + data[end:], "image/jpeg", LIMITS).shape == (4000, 4000, 3)
    with pytest.raises(ImageError, match="too many scans"):
        decode(data[:end] + scan * 2000 + data[end:], "image/jpeg", LIMITS)


def test_a_mislabelled_file_is_refused() -> None:
    with pytest.raises(ImageError, match="is image/png, not image/jpeg as declared"):
        decode(encoded(halves()), "image/jpeg", LIMITS)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(ImageError, match="not a PNG, JPEG, WebP or GIF"):
        decode(encoded(halves(), kind), "image/png", LIMITS)


def test_size_is_checked_before_decoding() -> None:
    """The header promises a billion pixels; there are none."""
    data = bytearray(encoded(Image.new("1", (40, 20))))
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    with pytest.raises(ImageError, match=r"broken|40000 x 40000"):
        decode(bytes(data), "image/png", LIMITS)
    for kind, options in (("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("JPEG", {})):
        with pytest.raises(ImageError, match="40 x 20 pixels; at most 100 in all"):
            decode(encoded(halves(), kind, **options), f"image/{kind.lower()}", ImageLimits(max_pixels=100))
    with pytest.raises(ImageError, match="40 x 20 pixels; at most 100 in all"):
        decode(encoded(halves()), "image/png", ImageLimits(max_pixels=100))
    with pytest.raises(ImageError, match="39 on a side"):
        decode(encoded(halves()), "image/png", ImageLimits(max_side=39))
    with pytest.raises(ImageError, match="at most 50 are accepted"):
        decode(encoded(halves()), "image/png", ImageLimits(max_bytes=50))


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"<svg/>"]
)
def test_stumps_are_refused(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data, "image/png", LIMITS)


def test_corpus_and_its_corruptions() -> None:
    """Every file, whole, cut short and with bytes changed: pixels or an ImageError."""
    files = [file for file in sorted((shared_data() / "images").rglob("*")) if file.suffix in SUFFIXES]
    assert len(files) > 30
    choose = random.Random(5)
    decoded = refused = 0
    for file in files:
        whole = file.read_bytes()
        for data in [whole, whole[: len(whole) // 2], *(_changed(whole, choose) for _ in range(6))]:
            try:
                assert decode(data, SUFFIXES[file.suffix], LIMITS).ndim == 3
                decoded += 1
            except ImageError:
                refused += 1
    assert decoded > len(files) // 2
    assert refused > len(files)


def _changed(whole: bytes, choose: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(choose.randint(1, 9)):
        data[choose.randrange(len(data))] = choose.randrange(256)
    return bytes(data)
