"""Plain drawings as somebody with Pillow makes them, to measure with: nothing of them is in the training data.

One shape by the drawing calls of Pillow itself, in the colors that Pillow knows by those names.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageColor, ImageDraw

from .pictures import SHAPE_COLORS, SHAPES, Sight

KINDS = (
    "large, on white", "small", "outlines", "colored grounds", "not square", "squares and rectangles",
    "several at once",
)  # fmt: skip
"""What differs from large, filled shapes in square pictures on white; in the last some of the second to fifth."""
_SQUARE = (96, 128, 200, 224, 256, 400)
_OBLONG = ((320, 180), (320, 240), (200, 300), (300, 200), (240, 320), (640, 480))
_NEAREST = 80
"""Least distance of a shape's color from the ground's, in RGB."""


def drawing(rng: random.Random, kind: str) -> tuple[Image.Image, Sight]:
    """A drawing of one of the KINDS, and what it shows."""
    traits = [one for one in KINDS[1:5] if rng.random() < 0.5] if kind == "several at once" else [kind]
    side = rng.choice(_SQUARE)
    image_size = rng.choice(_OBLONG) if "not square" in traits else (side, side)
    shape = rng.choice(("square", "rectangle") if "squares and rectangles" in traits else SHAPES)
    while True:
        color = rng.choice(SHAPE_COLORS)
        ground = rng.choice(SHAPE_COLORS) if "colored grounds" in traits else "white"
        if color != ground and math.dist(ImageColor.getrgb(color), ImageColor.getrgb(ground)) >= _NEAREST:
            break
    image = Image.new("RGB", image_size, ground)
    share = rng.uniform(0.25, 0.4) if "small" in traits else rng.uniform(0.45, 0.8)
    least = min(image_size)
    pen = max(1, round(0.05 * least)) if "outlines" in traits else 0
    _draw(image, rng, shape, color, share * least, pen)
    return image, Sight(shape, color, ground, Image.new("L", (1, 1)))


def _draw(image: Image.Image, rng: random.Random, shape: str, color: str, side: float, width: int) -> None:
    """The shape, ``side`` pixels long, near the middle; with a ``width`` only its outline."""
    pen = ImageDraw.Draw(image)
    x, y = (room / 2 + rng.uniform(-0.4, 0.4) * (room - side) for room in image.size)
    fill, outline = (None, color) if width else (color, None)
    half = side / 2
    if shape == "circle":
        pen.ellipse((x - half, y - half, x + half, y + half), fill, outline, width)
        return
    if shape in ("square", "rectangle"):
        other = half * (1 if shape == "square" else rng.uniform(0.4, 0.7))
        across, down = (half, other) if rng.random() < 0.5 else (other, half)
        pen.rectangle((x - across, y - down, x + across, y + down), fill, outline, width)
        return
    if shape == "triangle":
        corners = [(x, y - half), (x + half, y + half), (x - half, y + half)]
    else:
        reach = [half * (0.4 if n % 2 else 1.0) for n in range(10)]
        corners = [(x + r * math.sin(n * math.pi / 5), y - r * math.cos(n * math.pi / 5)) for n, r in enumerate(reach)]
    if width:
        pen.line([*corners, corners[0], corners[1]], fill=color, width=width, joint="curve")
    else:
        pen.polygon(corners, fill=color)
