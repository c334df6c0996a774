"""An image file to RGB pixels, or a sentence that says what is wrong with it.

Owns what every odd file becomes: EXIF orientation is applied, the first frame stands for an animation,
transparency lies on white, 16-bit channels keep their upper half. Decoding is Pillow's; its formats beyond the four
that the API names are never tried. Size is checked before a pixel is decoded.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from aiexport_edge.engine.images.limits import FORMATS, ImageError, ImageLimits
from aiexport_edge.engine.images.patches import Pixels

MEDIA_TYPES = {name: media_type for media_type, name in FORMATS.items()}
_DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N")

Image.MAX_IMAGE_PIXELS = None  # the limit is ours, and an error rather than a warning


def decode(data: bytes, media_type: str, limits: ImageLimits) -> Pixels:
    """uint8 [height, width, 3] of a file. Raises ImageError, and nothing else, for whatever `data` holds.

    `media_type` is what the client says it is, one of FORMATS; a file of another kind is refused.
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


def _decode(data: bytes, media_type: str, limits: ImageLimits) -> Pixels:
    try:
        image = Image.open(io.BytesIO(data), formats=list(MEDIA_TYPES))
    except UnidentifiedImageError:
        raise ImageError("the file is not a PNG, JPEG, WebP or GIF image, or it is broken") from None
    with image:
        found = MEDIA_TYPES.get(image.format or "", "another kind")
        if found != media_type:
            raise ImageError(f"the file is {found}, not {media_type} as declared")
        width, height = image.size
        if width * height > limits.max_pixels or max(width, height) > limits.max_side:
            raise ImageError(
                f"the image has {width} x {height} pixels; at most {limits.max_pixels} in all "
                f"and {limits.max_side} on a side are accepted"
            )
        image.seek(0)
        image.load()
        upright = ImageOps.exif_transpose(image)
        return np.asarray(_flatten(upright))


def _flatten(image: Image.Image) -> Image.Image:
    """RGB, with white where it is transparent."""
    if image.mode in _DEEP_MODES or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")
