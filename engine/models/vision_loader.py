"""The vision tower's weights out of a checkpoint, which tensors they are and what they make.

Owns the names under `model.visual.`. How tensors are read and converted is `weights.py`'s.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from aiexport_edge.engine.images.patches import PatchConfig
from aiexport_edge.engine.models.vision import Merger, VisionLayer, VisionTower
from aiexport_edge.engine.models.vision_config import VisionConfig
from aiexport_edge.kernels.linear import PackedLinear

PREFIX = "model.visual."
BLOCK_PATCHES_CPU, BLOCK_PATCHES_CARD = 128, 2048  # patches of a unit of work: about as long as a step of decodes


class Parameters(Protocol):
    """Where the weights come from."""

    def parameter(self, *names: str) -> Tensor:
        """The tensor `names`, in the model's dtype and on its device."""
        ...

    def plain_product(self, prefix: str, *, deterministic: bool) -> PackedLinear:
        """The product `prefix`.weight and .bias, rows by all that is behind them, never rounded."""
        ...


def tower_shapes(vision: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the tower, by its Hugging Face name."""
    width, inner = vision.hidden_size, vision.intermediate_size
    merged = width * vision.merge_size**2
    patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    products: dict[str, tuple[int, ...]] = {"patch_embed.proj": (width, *patch)}
    norms: dict[str, int] = {}
    for index in range(vision.num_layers):
        block = f"blocks.{index}."
        products |= {
            f"{block}attn.qkv": (3 * width, width),
            f"{block}attn.proj": (width, width),
            f"{block}mlp.linear_fc1": (inner, width),
            f"{block}mlp.linear_fc2": (width, inner),
        }
        norms |= {f"{block}norm1": width, f"{block}norm2": width}
    for merger, norm_size in _mergers(vision).items():
        products |= {
            f"{merger}.linear_fc1": (merged, merged),
            f"{merger}.linear_fc2": (vision.out_hidden_size, merged),
        }
        norms[f"{merger}.norm"] = norm_size
    shapes: dict[str, tuple[int, ...]] = {f"{PREFIX}pos_embed.weight": (vision.num_positions, width)}
    for name, shape in products.items():
        shapes |= {f"{PREFIX}{name}.weight": shape, f"{PREFIX}{name}.bias": shape[:1]}
    for name, size in norms.items():
        shapes |= {f"{PREFIX}{name}.weight": (size,), f"{PREFIX}{name}.bias": (size,)}
    return shapes


def load_tower(
    weights: Parameters, vision: VisionConfig, images: PatchConfig, *, deterministic: bool, block_patches: int = 0
) -> VisionTower:
    """The tower of a checkpoint that has been checked. `images` is the model's preprocessor_config.json, which agrees
    with `vision`. `block_patches` 0: by the device.
    """

    def product(name: str) -> PackedLinear:
        return weights.plain_product(f"{PREFIX}{name}", deterministic=deterministic)

    def norm(name: str) -> tuple[Tensor, Tensor]:
        return weights.parameter(f"{PREFIX}{name}.weight"), weights.parameter(f"{PREFIX}{name}.bias")

    positions = weights.parameter(f"{PREFIX}pos_embed.weight")
    layers = [
        VisionLayer(
            attention_norm=norm(f"blocks.{index}.norm1"),
            qkv=product(f"blocks.{index}.attn.qkv"),
            out=product(f"blocks.{index}.attn.proj"),
            mlp_norm=norm(f"blocks.{index}.norm2"),
            up=product(f"blocks.{index}.mlp.linear_fc1"),
            down=product(f"blocks.{index}.mlp.linear_fc2"),
        )
        for index in range(vision.num_layers)
    ]
    merger, *deepstack_mergers = (
        Merger(norm(f"{name}.norm"), product(f"{name}.linear_fc1"), product(f"{name}.linear_fc2"))
        for name in _mergers(vision)
    )
    block_patches = block_patches or (BLOCK_PATCHES_CPU if positions.device.type == "cpu" else BLOCK_PATCHES_CARD)
    square = vision.merge_size**2
    return VisionTower(
        vision,
        patch_embedding=product("patch_embed.proj"),
        positions=positions,
        layers=layers,
        merger=merger,
        deepstack_mergers=deepstack_mergers,
        mean=images.mean,
        std=images.std,
        block_patches=-(-block_patches // square) * square,
    )


def _mergers(vision: VisionConfig) -> dict[str, int]:
    """Names of the mergers, the last layer's first, and the sizes of their norms."""
    names = {"merger": vision.hidden_size}
    for index in range(len(vision.deepstack_layers)):
        names[f"deepstack_merger_list.{index}"] = vision.hidden_size * vision.merge_size**2
    return names
