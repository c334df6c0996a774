"""Simple pictures and what they show: one shape in one color on a background, as a few lines of code would draw it.

Sizes, places, turns, outlines, soft or hard edges, slightly different tones, noise, and what JPEG or WebP leave of it
all vary. A ``wide`` share goes further: smaller shapes, thinner pens, rectangles that are nearly squares, pure colors,
grounds of every color. The same random source gives the same pictures. Knows nothing of the model.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageColor, ImageDraw

Color = tuple[int, int, int]
Hand = Literal["easy", "usual", "wide"]
"""Who draws: large, filled and mostly upright; as most pictures are; or as wide apart as pictures come."""

COLORS: dict[str, tuple[Color, ...]] = {
    "red": ((255, 0, 0), (255, 0, 0), (220, 20, 60), (200, 30, 30), (230, 55, 45), (178, 24, 24)),
    "green": ((0, 128, 0), (0, 255, 0), (0, 170, 0), (34, 139, 34), (50, 205, 50), (40, 170, 90), (0, 100, 0)),
    "blue": ((0, 0, 255), (0, 0, 255), (30, 60, 200), (30, 144, 255), (65, 105, 225), (0, 0, 139), (52, 130, 215)),
    "yellow": ((255, 255, 0), (255, 255, 0), (255, 221, 0), (240, 220, 60), (250, 235, 90)),
    "orange": ((255, 165, 0), (255, 165, 0), (255, 140, 0), (240, 120, 20), (255, 128, 0)),
    "purple": ((128, 0, 128), (128, 0, 128), (160, 32, 240), (110, 40, 170), (138, 43, 226), (150, 85, 180), (90, 20, 130)),  # noqa: E501
    "pink": ((255, 192, 203), (255, 105, 180), (255, 150, 190), (255, 170, 185), (240, 130, 170)),
    "brown": ((139, 69, 19), (165, 42, 42), (120, 70, 30), (101, 67, 33), (150, 75, 0)),
    "black": ((0, 0, 0), (0, 0, 0), (22, 22, 22)),
    "white": ((255, 255, 255), (255, 255, 255), (246, 246, 246)),
    "gray": ((128, 128, 128), (128, 128, 128), (105, 105, 105), (160, 160, 160), (90, 90, 90)),
    "cyan": ((0, 255, 255), (0, 255, 255), (0, 210, 220), (30, 220, 225)),
}  # fmt: skip
"""Tones of each colour by name; a tone more than once is the likelier one."""
SHAPE_COLORS = tuple(COLORS)
_COLOR_WEIGHTS = (14, 13, 14, 11, 9, 9, 6, 6, 8, 6, 6, 5)
LIGHT: dict[str, tuple[Color, ...]] = {
    "light blue": ((173, 216, 230), (190, 215, 250)),
    "light green": ((144, 238, 144), (190, 240, 190)),
    "light yellow": ((255, 255, 205), (255, 250, 190)),
    "light gray": ((211, 211, 211), (200, 200, 200), (221, 221, 221)),
}
"""Tones that only backgrounds have."""
PURE: dict[str, Color] = {name: ImageColor.getrgb(name)[:3] for name in COLORS}
"""What the web calls so."""
SHAPES = ("circle", "square", "triangle", "rectangle", "star")
_SHAPE_WEIGHTS = (24, 24, 22, 16, 14)
MASK = 96
"""Side of the small picture of where the shape is."""
_SIZES = (
    (320, 180), (320, 240), (200, 300), (300, 200), (240, 320), (400, 300), (300, 400), (640, 480), (640, 360),
    (480, 640), (160, 90), (160, 120), (150, 100), (100, 150), (180, 320), (256, 128), (100, 200), (128, 96),
)  # fmt: skip
"""Usual widths and heights that are not square."""
_FORMATS, _FORMAT_WEIGHTS = ("PNG", "JPEG", "WEBP"), (55, 30, 15)


@dataclass(frozen=True, slots=True)
class Sight:
    """What a picture shows. ``mask`` [MASK, MASK] is white where the shape covers it, an outline's inside included."""

    shape: str
    color: str
    background: str
    mask: Image.Image


def picture(
    rng: random.Random, size: tuple[int, int] | None = None, *, plain: float = 0.0, wide: float = 0.0
) -> tuple[Image.Image, Sight]:
    """An RGB picture, of a random size unless one (width, height) is given, and what it shows.

    A share ``plain`` of pictures has large, filled, mostly upright shapes, which are quicker learnt; of the others a
    share ``wide`` is drawn as wide apart as pictures come. Without ``wide`` none of the random source is spent on it.
    """
    hand: Hand = "easy" if rng.random() < plain else "wide" if wide and rng.random() < wide else "usual"
    width, height = size or size_of(rng)
    shape = rng.choices(SHAPES, _SHAPE_WEIGHTS)[0]
    ground, ground_color = _any_ground(rng) if hand == "wide" else _background(rng)
    while True:
        color = rng.choices(SHAPE_COLORS, None if hand == "wide" else _COLOR_WEIGHTS)[0]
        tone = _any_tone(rng, color) if hand == "wide" else _tone(rng, COLORS[color])
        if color not in ground and math.dist(tone, ground_color) > (80 if hand == "wide" else 105):
            break
    image = Image.new("RGB", (width, height), ground_color)
    if rng.random() < 0.06:
        image = _graded(rng, image)
    mask = _draw(rng, image, shape, tone, hand)
    if rng.random() < 0.1:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(1, 12), (height, width, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return image, Sight(shape, color, ground, mask)


def size_of(rng: random.Random, most: int = 512, *, wide: float = 0.0) -> tuple[int, int]:
    """Width and height: between 32 and ``most``, two of three square; of a share ``wide`` none is."""
    if wide and rng.random() < wide:
        return _oblong(rng, most)
    side = rng.choice((32, 48, 64, 64, 96, 100, 128, 128, 160, 200, 224, 224, 256, 256, 300, 320, 384, 400, 448, 512))
    if rng.random() < 0.2:
        side = rng.randint(32, 512)
    side = side if side <= most else rng.randint(64, most)
    if rng.random() < 0.66:
        return side, side
    other = min(most, max(32, round(side * rng.choice((0.5, 0.625, 0.75, 0.8, 1.25, 1.33, 1.5, 1.78)))))
    return side, other


def _oblong(rng: random.Random, most: int) -> tuple[int, int]:
    width, height = rng.choice(_SIZES)
    if rng.random() < 0.3:
        width, height = round(width * rng.uniform(0.85, 1.15)), round(height * rng.uniform(0.85, 1.15))
    scale = min(rng.choice((1.0, 1.0, 0.75, 0.5)), most / max(width, height))
    return max(48, round(width * scale)), max(48, round(height * scale))


def file_of(rng: random.Random, image: Image.Image) -> tuple[bytes, str]:
    """The picture as a file and its media type."""
    if rng.random() < _FORMAT_WEIGHTS[0] / sum(_FORMAT_WEIGHTS):
        out = io.BytesIO()
        image.save(out, "PNG", compress_level=1)
        return out.getvalue(), "image/png"
    return _lossy(rng, image)


def _lossy(rng: random.Random, image: Image.Image) -> tuple[bytes, str]:
    kind = rng.choices(_FORMATS[1:], _FORMAT_WEIGHTS[1:])[0]
    out = io.BytesIO()
    image.save(out, kind, quality=rng.randint(50, 95), **({"method": 0} if kind == "WEBP" else {}))
    return out.getvalue(), f"image/{kind.lower()}"


def seen(rng: random.Random, image: Image.Image) -> Image.Image:
    """The picture as it comes out of a file."""
    if rng.random() < _FORMAT_WEIGHTS[0] / sum(_FORMAT_WEIGHTS):
        return image
    return Image.open(io.BytesIO(_lossy(rng, image)[0])).convert("RGB")


def _tone(rng: random.Random, tones: tuple[Color, ...]) -> Color:
    tone, spread = rng.choice(tones), rng.choice((0, 0, 6, 12))
    r, g, b = (min(255, max(0, part + rng.randint(-spread, spread))) for part in tone)
    return r, g, b


def _any_tone(rng: random.Random, color: str) -> Color:
    return PURE[color] if rng.random() < 0.5 else _tone(rng, COLORS[color])


def _any_ground(rng: random.Random) -> tuple[str, Color]:
    r = rng.random()
    if r < 0.1:
        name = rng.choice(list(LIGHT))
        return name, _tone(rng, LIGHT[name])
    name = "white" if r < 0.38 else "black" if r < 0.48 else rng.choice(SHAPE_COLORS)
    return name, _any_tone(rng, name)


def _background(rng: random.Random) -> tuple[str, Color]:
    r = rng.random()
    if r < 0.5:
        return "white", (255, 255, 255) if rng.random() < 0.8 else _tone(rng, COLORS["white"])
    if r < 0.67:
        return "black", (0, 0, 0) if rng.random() < 0.8 else _tone(rng, COLORS["black"])
    tones = LIGHT if r < 0.82 else COLORS
    name = rng.choice(list(tones))
    return name, _tone(rng, tones[name])


def _graded(rng: random.Random, image: Image.Image) -> Image.Image:
    """The picture with a faint shade from one side to the other."""
    ramp = np.linspace(0, rng.uniform(-25, 25), image.width if rng.random() < 0.5 else image.height)
    ramp = ramp[None, :, None] if len(ramp) == image.width else ramp[:, None, None]
    return Image.fromarray(np.clip(np.asarray(image) + ramp, 0, 255).astype(np.uint8))


def _draw(rng: random.Random, image: Image.Image, shape: str, tone: Color, hand: Hand) -> Image.Image:
    """Draw the shape somewhere; where it is, as in a Sight."""
    points = _outline(rng, shape, (0.35, 0.75) if hand == "wide" else (0.3, 0.62))
    points = _turned(points, 0.0 if hand == "easy" and rng.random() < 0.7 else _turn(rng, shape))
    xs, ys = zip(*points, strict=True)
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    outlined = hand == "wide" and rng.random() < 0.35
    share, least = _size(rng, shape, max(image.size), hand, outlined=outlined)
    across = max(wide, high) if hand == "wide" else min(wide, high)
    scale = max(share * min(image.width / wide, image.height / high), least / across)
    scale = min(scale, 0.97 * min(image.width / wide, image.height / high))
    free_x, free_y = image.width - scale * wide, image.height - scale * high
    middle = rng.random() < 0.4
    left = free_x / 2 if middle else rng.uniform(0, free_x)
    top = free_y / 2 if middle else rng.uniform(0, free_y)
    fold = rng.choice((1, 1, 3))
    width = min(rng.uniform(0.03, 0.1) * min(image.size), 0.25 * scale * min(wide, high)) if outlined else 0.0
    edge = math.ceil(width / 2)
    box = (
        math.floor(left) - edge, math.floor(top) - edge,
        math.ceil(left + scale * wide) + 1 + edge, math.ceil(top + scale * high) + 1 + edge,
    )  # fmt: skip
    mask = Image.new("L", ((box[2] - box[0]) * fold, (box[3] - box[1]) * fold), 0)
    placed = [
        (((x - min(xs)) * scale + left - box[0]) * fold, ((y - min(ys)) * scale + top - box[1]) * fold)
        for x, y in points
    ]
    pen = ImageDraw.Draw(mask)
    if not outlined and (hand != "usual" or rng.random() < 0.9):
        pen.polygon(placed, fill=255)
    else:
        width = width or max(1.0, max(image.size) / 100, rng.uniform(0.03, 0.14) * scale * min(wide, high))
        pen.line([*placed, placed[0], placed[1]], fill=255, width=max(1, round(width * fold)), joint="curve")
    if fold > 1:
        mask = mask.resize((mask.width // fold, mask.height // fold), Image.Resampling.BOX)
    image.paste(tone, (box[0], box[1]), mask)
    whole = Image.new("L", (MASK, MASK), 0)
    across, down = whole.width / image.width, whole.height / image.height
    corners = [(((x - min(xs)) * scale + left) * across, ((y - min(ys)) * scale + top) * down) for x, y in points]
    ImageDraw.Draw(whole).polygon(corners, fill=255)
    return whole


def _size(rng: random.Random, shape: str, side: int, hand: Hand, *, outlined: bool) -> tuple[float, float]:
    """How much of the room the shape takes, and at least how many pixels in a picture with this longer side."""
    fine = shape == "star"
    floor = 9 if fine else 7
    if hand != "wide":
        share = rng.uniform(0.5, 0.95) if hand == "easy" else rng.uniform(0.36, 0.92)
        return share, max((36 if fine else 28) / 128 * side, floor)
    low, high = (0.36, 0.92) if outlined else (0.22, 0.45) if rng.random() < 0.5 else (0.4, 0.95)
    return rng.uniform(low, high), max((0.24 if fine else 0.2) * side, floor)


def _turn(rng: random.Random, shape: str) -> float:
    """Degrees by which the shape is turned."""
    if shape == "circle" or rng.random() < 0.7:
        return 0.0
    if shape in ("square", "rectangle"):
        return rng.uniform(-24, 24)
    return rng.uniform(0, 360)


def _turned(points: list[tuple[float, float]], degrees: float) -> list[tuple[float, float]]:
    if not degrees:
        return points
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def _outline(rng: random.Random, shape: str, sides: tuple[float, float]) -> list[tuple[float, float]]:
    """Corners of the shape, y downwards. A rectangle's shorter side is between ``sides`` of its longer one."""
    if shape == "circle":
        return _ring(72, lambda i: 1.0)
    if shape in ("square", "rectangle"):
        x, y = (1.0, 1.0) if shape == "square" else (1.0, rng.uniform(*sides))
        if rng.random() < 0.4:
            x, y = y, x
        return [(-x, -y), (x, -y), (x, y), (-x, y)]
    if shape == "triangle":
        if rng.random() < 0.5:
            return _ring(3, lambda i: 1.0)
        tip = rng.choice((0.0, 0.0, 0.0, -1.0, 1.0, rng.uniform(-0.8, 0.8)))
        return [(tip, -rng.uniform(0.7, 1.3)), (1.0, 0.7), (-1.0, 0.7)]
    deep = rng.uniform(0.35, 0.5)
    return _ring(10, lambda i: deep if i % 2 else 1.0)


def _ring(count: int, radius: object) -> list[tuple[float, float]]:
    """Points around a circle, the first at the top."""
    assert callable(radius)
    turns = [2 * math.pi * i / count for i in range(count)]
    return [(radius(i) * math.sin(t), -radius(i) * math.cos(t)) for i, t in enumerate(turns)]
