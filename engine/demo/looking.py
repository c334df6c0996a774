"""The tower alone: what it is shown and asked for directly, without a decoder."""

from __future__ import annotations

import argparse
import json
import random

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from aiexport_edge.engine.images.resize import resize

from .eyes import PATCHES, Eyes, EyesShape, squares_of
from .pictures import COLORS, LIGHT, SHAPE_COLORS, SHAPES, Sight, picture, seen, size_of
from .team import Rates, Team, split
from .train import schedule

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
GROUNDS = sorted({*COLORS, *LIGHT})
FINE = 4
"""Parts that a patch's side is cut into where the tower learns what a shape covers."""


def fit(image: Image.Image) -> Bytes:
    """uint8 [height, width, 3] in the size that the tower takes."""
    return np.asarray(resize(image, PATCHES))


def look(seed: int, count: int, plain: float, wide: float = 0.0) -> tuple[Bytes, Ints, Bytes]:
    """Pictures of one size [B, height, width, 3], what they show [B, 3] (shape, color, background) and where.

    The last, [B, rows * FINE, columns * FINE], is how far the shape covers the parts of each patch.
    """
    rng = random.Random(seed)
    size = size_of(rng, most=192, wide=0.6 * wide)
    pixels, sights_, masks = [], [], []
    for _ in range(count):
        image, sight = picture(rng, size, plain=plain, wide=wide)
        pixels.append(fit(seen(rng, image)))
        sights_.append(sight)
        height, width = (side // PATCHES.patch_size * FINE for side in pixels[-1].shape[:2])
        masks.append(np.asarray(sight.mask.resize((width, height), Image.Resampling.BOX)))
    return np.stack(pixels), np.array([_numbers(s) for s in sights_]), np.stack(masks)


def _numbers(sight: Sight) -> tuple[int, int, int]:
    return SHAPES.index(sight.shape), SHAPE_COLORS.index(sight.color), GROUNDS.index(sight.background)


class Looking(nn.Module):
    """What the tower is asked for directly.

    The mean of its features must tell shape, color and background, and each patch, in the last two layers, which parts
    of it the shape covers. Without the second, which is learnt at once, the shapes are long in coming.
    """

    def __init__(self, shape: EyesShape) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(shape.out, len(names)) for names in (SHAPES, SHAPE_COLORS, GROUNDS))
        self.masks = nn.ModuleList(nn.Linear(shape.hidden, FINE**2) for _ in range(2))

    def forward(self, eyes: Eyes, batch: tuple[Bytes, Ints, Bytes]) -> tuple[Tensor, Tensor]:
        """The loss, and the shares of right answers [3]."""
        pixels, shown, mask = (torch.from_numpy(x) for x in batch)
        with torch.autocast("cpu", torch.bfloat16):
            layers = eyes.layers(pixels)
            mean = eyes.merger(layers[-1]).float().mean(1)
        covered = squares_of(mask[..., None].float() / 255, FINE)
        loss = torch.zeros(())
        for head, layer in zip(self.masks, layers[-2:], strict=True):
            loss = loss + 2 * F.binary_cross_entropy_with_logits(head(layer.float()), covered)
        right = []
        for k, (head, weight) in enumerate(zip(self.heads, (1.0, 0.5, 0.3), strict=True)):
            logits = head(mean)
            loss = loss + weight * F.cross_entropy(logits, shown[:, k])
            right.append((logits.argmax(1) == shown[:, k]).float().mean())
        return loss, torch.stack(right)


def learn_to_look(eyes: Eyes, looking: Looking, args: argparse.Namespace, team: Team) -> None:
    """Train the tower and its merger, alone."""
    inner, rest = split(eyes, lambda name: not name.startswith("deepstack"))
    rates = Rates(inner, [*rest, *looking.parameters()], args.look_rate, 0.002)
    right, step = torch.zeros(3), 0
    while (done := team.done(args.look)) < 1:
        number = step * team.size + team.rank
        loss, now = looking(eyes, look(args.seed * 1_000_003 + number, 64, 0.3 * (1 - done), args.wide))
        torch.autograd.backward(loss)
        rates.step(schedule(done, 0.6) * min(1.0, (step + 1) / 40), team)
        step += 1
        right += (now - right) * max(0.02, 1 / step)
        if step % 50 == 0 and not team.rank:
            shares = [round(x, 3) for x in right.tolist()]
            print(json.dumps({"step": step, "right": shares, "done": round(done, 3)}), flush=True)
    if not team.rank:
        torch.save({"eyes": eyes.state_dict(), "looking": looking.state_dict()}, args.out / "eyes.pt")


def learn_to_tell(eyes: Eyes, looking: Looking, wide: float, batches: int = 100) -> None:
    """Train what reads the tower, and leave the tower as it is: a finished model has come without."""
    eyes.requires_grad_(False)
    adam = torch.optim.AdamW(looking.parameters(), lr=0.005)
    for number in range(batches):
        loss, _ = looking(eyes, look(number, 32, 0.0, wide))
        torch.autograd.backward(loss)
        adam.step()
        adam.zero_grad()
    eyes.requires_grad_(True)
