"""Pixels to the size that a model's patches want, as the Qwen2-VL and Qwen3-VL image processors resize them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from aiexport_edge.engine.images.patches import PatchConfig, Pixels


def resize(pixels: Pixels, config: PatchConfig) -> Pixels:
    """uint8 [rows * patch_size, columns * patch_size, 3] of uint8 [height, width, 3], bicubic; rows and columns as
    `config.grid` has them. Raises ImageError where the image is a mere line.
    """
    rows, columns = config.grid(*pixels.shape[:2])
    height, width = rows * config.patch_size, columns * config.patch_size
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
