"""A picture to the size that a model's patches want, as the Qwen2-VL and Qwen3-VL image processors resize it."""

from __future__ import annotations

from PIL import Image

from aiexport_edge.engine.images.patches import PatchConfig


def resize(image: Image.Image, config: PatchConfig) -> Image.Image:
    """`columns * patch_size` wide and `rows * patch_size` high, bicubic; rows and columns as `config.grid` has them.
    Raises ImageError where the image is a mere line.
    """
    rows, columns = config.grid(image.height, image.width)
    size = columns * config.patch_size, rows * config.patch_size
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
