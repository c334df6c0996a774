"""Made-up pictures: what a runner does with eyes before it serves. See `warm_up.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aiexport_edge.engine.core.pictures import Eyes, key_of
from aiexport_edge.engine.core.plan import Chunk, Encode, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import ImageInput
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.images.positions import ImageSpan, prompt_positions
from aiexport_edge.engine.models.vision_config import Grid

if TYPE_CHECKING:
    from aiexport_edge.engine.core.runner import Runner


def picture_steps(runner: Runner, model: int, requests: Sequence[Request]) -> list[StepPlan]:
    """The smallest picture through the tower, each of `requests` as a prompt that begins with it, and its end."""
    eyes = runner.eyes[model]
    if eyes is None:
        return []
    merge = eyes.config.merge_size
    pictured = [_with_picture(request, eyes, (merge, merge)) for request in requests]
    return [
        StepPlan([ModelPlan(model, [], [_encode(pictured[0], eyes, (merge, merge))])]),
        *[
            StepPlan([ModelPlan(model, [Chunk(request, 0, request.num_prompt_tokens, samples=False)])])
            for request in pictured
        ],
        StepPlan([], [key_of(pictured[0], 0)]),
    ]


def hold_largest_picture(runner: Runner, request: Request) -> StepPlan | None:
    """Begins the largest picture of `request`'s model and leaves it half done, with all the memory that it takes."""
    eyes = runner.eyes[request.model]
    if eyes is None:
        return None
    merge = eyes.config.merge_size
    side = max(1, math.isqrt(eyes.largest_patches) // merge) * merge
    request = _with_picture(request, eyes, (side, side))
    encode = _encode(request, eyes, (side, side))
    num_blocks = encode.num_units // (eyes.config.num_layers + 1)
    num_units = min(2 * num_blocks, encode.num_units - 1)  # patches, and one layer
    return StepPlan([ModelPlan(request.model, [], [Encode(request, 0, encode.key, num_units)])])


def _with_picture(request: Request, eyes: Eyes, grid: Grid) -> Request:
    size = eyes.config.patch_size**2 * 3
    spans = (ImageSpan(0, grid[0] // eyes.config.merge_size, grid[1] // eyes.config.merge_size),)
    return replace(
        request,
        images=(ImageInput(0, *grid, b"", bytes(grid[0] * grid[1] * size)),),
        spans=spans,
        positions=prompt_positions(max(request.num_prompt_tokens, spans[0].end), spans),
    )


def _encode(request: Request, eyes: Eyes, grid: Grid) -> Encode:
    return Encode(request, 0, key_of(request, 0), eyes.cost(grid)[0])
