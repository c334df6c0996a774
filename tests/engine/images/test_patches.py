"""Patches against transformers' image processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from aiexport_edge.engine.images.limits import ImageError
from aiexport_edge.engine.images.patches import PatchConfig, patches
from aiexport_edge.engine.images.resize import resize

CONFIG = PatchConfig(
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    min_pixels=65_536,
    max_pixels=1 << 20,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.25, 0.5),
)


@pytest.mark.parametrize(
    ("height", "width"), [(256, 256), (300, 500), (31, 40), (1, 1), (3, 600), (1400, 1300), (257, 255), (2000, 20)]
)
def test_patches_match_transformers(height: int, width: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor: Any = Qwen2VLImageProcessorPil(
        patch_size=CONFIG.patch_size,
        temporal_patch_size=CONFIG.temporal_patch_size,
        merge_size=CONFIG.merge_size,
        size={"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels},
        image_mean=list(CONFIG.mean),
        image_std=list(CONFIG.std),
    )
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = processor(images=[pixels], return_tensors="np", input_data_format="channels_last")
    made, grid = patches(np.asarray(resize(Image.fromarray(pixels), CONFIG)), CONFIG)
    assert expected["image_grid_thw"].tolist() == [[1, *grid]]
    assert CONFIG.grid(height, width) == grid
    np.testing.assert_allclose(made, expected["pixel_values"], atol=1e-5)


def test_a_line_is_refused() -> None:
    with pytest.raises(ImageError, match="at most 200 times"):
        CONFIG.grid(1, 201)
