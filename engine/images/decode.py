"""An image file to an RGB picture, or a sentence that says what is wrong with it.

Owns what every odd file becomes: EXIF orientation is applied, the first frame stands for an animation,
transparency lies on white, 16-bit channels keep their upper half. Decoding is Pillow's; its formats beyond the four
that the API names are never tried. Size is checked before a pixel is decoded.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from aiexport_edge.engine.images.limits import FORMATS, ImageError, ImageLimits

MEDIA_TYPES = {name: media_type for media_type, name in FORMATS.items()}
# Phones write JPEG files with a second picture behind the first (CIPA DC-007; of gain maps, of depth).
_VARIANTS = {"MPO": "image/jpeg"}
# Of a JPEG, which may be cut into any number of scans, each over all its pixels: 10 MB of them take minutes.
MOST_SCANNED_PIXELS = 20_000_000_000
_SCAN = b"\xff\xda"  # compressed data never holds it (ITU-T T.81, B.1.1.5)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N")

Image.MAX_IMAGE_PIXELS = None  # the limit is ours, and an error rather than a warning


def decode(data: bytes, media_type: str, limits: ImageLimits) -> Image.Image:
    """The picture of a file, mode RGB. Raises ImageError, and nothing else, for whatever `data` holds.

    `media_type` is what the client says it is, one of FORMATS; a file of another kind is refused. At most 16 bytes a
    pixel are held at any moment.
    """
    if media_type not in FORMATS:
        raise ImageError(f"the media type must be one of {', '.join(FORMATS)}")
    if len(data) > limits.max_bytes:
        raise ImageError(f"the file has {len(data)} bytes; at most {limits.max_bytes} are accepted")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; what matters is an exception
            return _decode(data, media_type, limits)
    except ImageError:
        raise
    except MemoryError:
        raise ImageError("the image takes more memory than there is; send a smaller one") from None
    except Exception as error:  # a decoder fed garbage raises what it likes
        raise ImageError("the file is broken or cut short") from error


def _decode(data: bytes, media_type: str, limits: ImageLimits) -> Image.Image:
    canvas = _webp_canvas(data)
    if canvas is not None and media_type == "image/webp":
        _check_size(*canvas, limits)  # Pillow has its decoder make room for the canvas before it tells the size
    try:
        image = Image.open(io.BytesIO(data), formats=list(MEDIA_TYPES))
    except UnidentifiedImageError:
        raise ImageError("the file is not a PNG, JPEG, WebP or GIF image, or it is broken") from None
    kind = image.format or ""
    found = MEDIA_TYPES.get(kind) or _VARIANTS.get(kind, "another kind")
    if found != media_type:
        raise ImageError(f"the file is {found}, not {media_type} as declared")
    _check_size(*image.size, limits)
    if media_type == "image/jpeg" and data.count(_SCAN) * image.width * image.height > MOST_SCANNED_PIXELS:
        raise ImageError("the image is stored in too many scans; save it anew")
    image.seek(0)
    image.load()
    orientation = _orientation(image)
    image.__dict__.pop("_decoder", None)  # of WebP: it holds the canvas twice more
    flat = _flatten(image)
    return flat if orientation is None else flat.transpose(orientation)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise ImageError(
            f"the image has {width} x {height} pixels; at most {limits.max_pixels} in all "
            f"and {limits.max_side} on a side are accepted"
        )


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height as the header has them (RFC 9649); None where it is of no known kind."""
    if len(data) < 30 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    match data[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """How the pixels are to be turned; None where EXIF says nothing that is meant."""
    said: object = image.getexif().get(ExifTags.Base.Orientation)
    return _TURNS.get(said) if isinstance(said, int) else None


def _flatten(image: Image.Image) -> Image.Image:
    """RGB, with white where it is transparent. Takes `image`: its pixels are gone when they are not needed."""
    if image.mode in _DEEP_MODES or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        flat = image.convert("RGB")
        if flat is not image:
            image.close()
        return flat
    layer = image
    if image.mode != "RGBA":
        layer = image.convert("RGBA")
        image.close()
    flat = Image.new("RGB", layer.size, (255, 255, 255))
    flat.paste(layer, mask=layer)
    layer.close()
    return flat
