"""A prompt with pictures as vLLM takes it: already of their size, in patches, found again by what is in them.

vLLM's own processor has no part in it: sizes, order of patches and tokens are those of the native backend. Pixels go
over as bytes; vLLM normalizes them on the device. It keeps features of pictures and pages of prompts apart by a name:
ours has the workspace's salt in it, so that nobody finds what another has sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from vllm.inputs import MultiModalInput, mm_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

from aiexport_edge.engine.core.protocol import ImageInput
from aiexport_edge.engine.images.patches import in_patches


@dataclass(frozen=True, slots=True)
class PatchShape:
    """Of a model of the Qwen-VL families."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int

    @classmethod
    def of(cls, vision_config: Any) -> PatchShape:
        """From `vision_config` as transformers reads it."""
        return cls(vision_config.patch_size, vision_config.temporal_patch_size, vision_config.spatial_merge_size)


def picture_input(
    token_ids: list[int], images: Sequence[ImageInput], shape: PatchShape, salt: bytes
) -> MultiModalInput:
    """The prompt `token_ids`, in which `images` have their tokens; takes as long as copying the pixels does."""
    grids = torch.tensor([(1, image.rows, image.columns) for image in images])
    num_patches = grids.prod(-1)
    fields = {
        "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", num_patches),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    values: Any = {
        "pixel_values": torch.from_numpy(np.concatenate([_patches(image, shape) for image in images])),
        "image_grid_thw": grids,
    }
    square = shape.merge_size**2
    return mm_input(
        token_ids,
        MultiModalKwargsItems.from_hf_inputs(values, fields),
        {"image": [_name(image, salt) for image in images]},
        {"image": [PlaceholderRange(image.start, image.rows * image.columns // square) for image in images]},
        cache_salt=salt.hex() or None,
    )


def _patches(image: ImageInput, shape: PatchShape) -> np.ndarray[Any, np.dtype[np.uint8]]:
    size = shape.patch_size
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(image.rows * size, image.columns * size, 3)
    return in_patches(pixels, size, shape.temporal_patch_size, shape.merge_size)


def _name(image: ImageInput, salt: bytes) -> str:
    return blake2b(len(salt).to_bytes(4, "little") + salt + image.digest, digest_size=32).hexdigest()
