"""The vision tower against transformers', on a small one with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from aiexport_edge.engine.images.patches import PatchConfig, patches
from aiexport_edge.engine.models.vision import Merger, VisionLayer, VisionTower
from aiexport_edge.engine.models.vision_config import FEWEST_PATCHES, Grid, VisionConfig, encoding_work
from aiexport_edge.kernels.linear import PackedLinear

CONFIG = VisionConfig(
    num_layers=4,
    hidden_size=48,
    intermediate_size=100,
    num_heads=4,
    in_channels=3,
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    out_hidden_size=40,
    num_positions=64,
    deepstack_layers=(1, 2),
    rope_theta=10000.0,
    image_token_id=1,
    video_token_id=2,
    vision_start_id=3,
    vision_end_id=4,
)


PATCHES = PatchConfig(4, 2, 2, 16, 4096, (0.5, 0.4, 0.6), (0.5, 0.25, 0.4))


def transformers_model() -> Any:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    model: Any = Qwen3VLVisionModel(
        Qwen3VLVisionConfig(
            depth=CONFIG.num_layers,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.intermediate_size,
            num_heads=CONFIG.num_heads,
            patch_size=CONFIG.patch_size,
            out_hidden_size=CONFIG.out_hidden_size,
            num_position_embeddings=CONFIG.num_positions,
            deepstack_visual_indexes=list(CONFIG.deepstack_layers),
        )
    )
    model.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def tower_of(model: Any, block_patches: int) -> VisionTower:
    weights = model.state_dict()

    def product(name: str) -> PackedLinear:
        weight = weights[f"{name}.weight"].flatten(1)
        return PackedLinear(weight, weights[f"{name}.bias"], dtype=torch.float32, deterministic=False)

    def norm(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    def merger(name: str) -> Merger:
        return Merger(norm(f"{name}.norm"), product(f"{name}.linear_fc1"), product(f"{name}.linear_fc2"))

    layers = [
        VisionLayer(
            norm(f"blocks.{i}.norm1"),
            product(f"blocks.{i}.attn.qkv"),
            product(f"blocks.{i}.attn.proj"),
            norm(f"blocks.{i}.norm2"),
            product(f"blocks.{i}.mlp.linear_fc1"),
            product(f"blocks.{i}.mlp.linear_fc2"),
        )
        for i in range(CONFIG.num_layers)
    ]
    return VisionTower(
        CONFIG,
        patch_embedding=product("patch_embed.proj"),
        positions=weights["pos_embed.weight"],
        layers=layers,
        merger=merger("merger"),
        deepstack_mergers=[merger(f"deepstack_merger_list.{i}") for i in range(len(CONFIG.deepstack_layers))],
        mean=PATCHES.mean,
        std=PATCHES.std,
        block_patches=block_patches,
    )


def picture(grid: Grid) -> np.ndarray[Any, np.dtype[np.uint8]]:
    size = (grid[0] * CONFIG.patch_size, grid[1] * CONFIG.patch_size, 3)
    return np.random.default_rng(grid).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("block_patches", [4, 16, 4096])
@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (12, 6), (4, 10), (2, 30)], ids=str)
@torch.inference_mode()
def test_features_match_transformers(grid: Grid, block_patches: int) -> None:
    model = transformers_model()
    pixels = picture(grid)
    inputs, _ = patches(pixels, PATCHES)
    expected = model(torch.from_numpy(inputs), grid_thw=torch.tensor([(1, *grid)]))
    features = tower_of(model, block_patches).encode(torch.from_numpy(pixels))
    torch.testing.assert_close(features.tokens, expected.pooler_output, rtol=1e-4, atol=1e-4)
    assert features.tokens.shape[0] == CONFIG.num_tokens(grid)
    for ours, theirs in zip(features.deepstack, expected.deepstack_features, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_large_pictures_go_in_smaller_blocks() -> None:
    """No unit is longer than one of a picture of 32 blocks; what comes out is what transformers has."""
    model, grid = transformers_model(), (32, 44)
    tower, pixels = tower_of(model, 32), picture(grid)
    work, of_many = (encoding_work(CONFIG, each, 32) for each in (grid, (32, 32)))
    assert of_many.block_patches == 32 > work.block_patches >= FEWEST_PATCHES
    assert work.unit_operations <= of_many.unit_operations
    inputs, _ = patches(pixels, PATCHES)
    expected = model(torch.from_numpy(inputs), grid_thw=torch.tensor([(1, *grid)]))
    encoding = tower.begin(torch.from_numpy(pixels))
    assert encoding.num_units == -(-32 * 44 // work.block_patches) * (CONFIG.num_layers + 1)
    encoding.advance(encoding.num_units)
    torch.testing.assert_close(encoding.features.tokens, expected.pooler_output, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_units_can_be_spread_over_steps_as_one_likes() -> None:
    tower = tower_of(transformers_model(), 16)
    pixels = torch.from_numpy(picture((12, 6)))
    whole = tower.encode(pixels)
    encoding = tower.begin(pixels)
    assert encoding.num_units == 5 * (CONFIG.num_layers + 1)
    for num_units in (1, 7, 3, encoding.num_units - 11):
        encoding.advance(num_units)
    assert torch.equal(encoding.features.tokens, whole.tokens)
    assert all(map(torch.equal, encoding.features.deepstack, whole.deepstack))
