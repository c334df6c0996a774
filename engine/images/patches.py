"""Pixels to the patches that a vision tower takes, as the Qwen2-VL and Qwen3-VL image processors make them.

Owns the size that an image is brought to (both sides multiples of a merged square, area within bounds, shape kept as
far as that allows) and the order of patches. Knows no files, no Pillow and no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from aiexport_edge.engine.images.limits import ImageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Value = TypeVar("Value", bound=np.generic)

MOST_ASPECT = 200

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True)
class PatchConfig:
    """As in `preprocessor_config.json`. `min_pixels` and `max_pixels` bound the area after resizing."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def square(self) -> int:
        """Pixels on a side of what becomes one token."""
        return self.patch_size * self.merge_size

    def with_at_most(self, max_tokens: int) -> PatchConfig:
        """The same with pictures of at most so many tokens; 0: as many as it has."""
        if not max_tokens:
            return self
        high = min(self.max_pixels, max_tokens * self.square**2)
        return replace(self, max_pixels=high, min_pixels=min(self.min_pixels, high))

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches that an image of this size becomes. Raises ImageError where it is a mere line."""
        rows, columns = self._resized(height, width)
        return rows // self.patch_size, columns // self.patch_size

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if max(height, width) > MOST_ASPECT * min(height, width):
            raise ImageError(
                f"the image has {width} x {height} pixels; one side may be at most {MOST_ASPECT} times the other"
            )
        square = self.square
        rows, columns = (max(square, round(side / square) * square) for side in (height, width))
        if rows * columns > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (max(square, math.floor(side / shrink / square) * square) for side in (height, width))
        elif rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (math.ceil(side * grow / square) * square for side in (height, width))
        return rows, columns


def patches(pixels: Pixels, config: PatchConfig) -> tuple[NDArray[np.float32], Grid]:
    """float32 [rows * columns, channels * frames * patch_size²] of uint8 [height, width, 3], and (rows, columns).

    `pixels` have been resized (`resize.py`): both sides are multiples of a merged square. Normalized by mean and std; a
    still image is repeated over the frames of a patch.
    """
    import numpy as np  # not in the engine process, which knows a picture's size alone

    height, width = pixels.shape[:2]
    scaled = pixels.astype(np.float32) * np.float32(1 / 255)
    mean, std = (np.array(three, np.float32) for three in (config.mean, config.std))
    normalized = ((scaled - mean) / std).astype(np.float32, copy=False)
    size = config.patch_size
    return in_patches(normalized, size, config.temporal_patch_size, config.merge_size), (height // size, width // size)


def in_patches(values: NDArray[Value], size: int, num_frames: int, merge: int) -> NDArray[Value]:
    """[rows * columns, channels * num_frames * size²] of [height, width, channels], whatever the values are.

    Patches go by merged squares: row of squares, column of squares, row and column within the square.
    """
    import numpy as np

    height, width, channels = values.shape
    rows, columns = height // size, width // size
    squares = values.reshape(rows // merge, merge, size, columns // merge, merge, size, channels)
    ordered = squares.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    frames = np.broadcast_to(ordered, (*ordered.shape[:5], num_frames, size, size))
    return frames.reshape(rows * columns, -1)
