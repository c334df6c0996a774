"""What config.json says about eyes: the vision tower's shape, and the tokens that stand for pictures.

Imports no torch: the engine process expands prompts by it. Knows nothing of how a picture is resized
(`images/preprocessor.py`) nor of the tower's weights (`vision.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from aiexport_edge.engine.models.config_values import Values

LARGE_BLOCKS = 32  # a picture of more blocks than that is cut into smaller ones
FEWEST_PATCHES = 16  # of a block, where it is not meant to be smaller

Grid = tuple[int, int]  # patches of an image: rows, columns; both multiples of the merge size


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The tower's shape. `num_positions` is the square of the learned grid's side; `patch_size` is in pixels.

    `deepstack_layers` are the layers after which features are taken for the decoder's first layers, in that order.
    In a prompt an image is `vision_start_id`, then `image_token_id` once for each merged patch, then `vision_end_id`.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_hidden_size: int
    num_positions: int
    deepstack_layers: tuple[int, ...]
    rope_theta: float
    image_token_id: int
    video_token_id: int
    vision_start_id: int
    vision_end_id: int

    @property
    def patch_elements(self) -> int:
        """Numbers in one patch: channels, frames, rows, columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    def num_tokens(self, grid: Grid) -> int:
        """Tokens that an image takes in the prompt."""
        return grid[0] * grid[1] // self.merge_size**2


@dataclass(frozen=True, slots=True)
class EncodingWork:
    """What encoding a picture takes: `num_units` of work, each of `block_patches` through one layer, all of about
    `unit_operations` (products and sums).
    """

    block_patches: int
    num_units: int
    unit_operations: float


def encoding_work(config: VisionConfig, grid: Grid, block_patches: int) -> EncodingWork:
    """A unit is one block of patches through one layer; making a block's patches and embedding them is one more.

    A patch costs the more, the more there are, since it attends to all. So blocks of pictures of more than
    `LARGE_BLOCKS` of them are smaller than `block_patches`: no unit costs more than one of a picture of that size.
    """
    num_patches, square = grid[0] * grid[1], config.merge_size**2
    products = 2 * (4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size)

    def patch_operations(num_keys: int) -> int:
        return products + 4 * config.hidden_size * num_keys

    if num_patches > LARGE_BLOCKS * block_patches:
        share = patch_operations(LARGE_BLOCKS * block_patches) / patch_operations(num_patches)
        fewest = max(min(FEWEST_PATCHES, block_patches), square)
        block_patches = max(int(share * block_patches), fewest) // square * square
    num_blocks = -(-num_patches // block_patches)
    return EncodingWork(
        block_patches, (config.num_layers + 1) * num_blocks, patch_operations(num_patches) * num_patches / num_blocks
    )


def read_vision_config(values: Values, *, hidden_size: int, num_layers: int, vocab_size: int) -> VisionConfig:
    """Of the whole config.json of a model with `num_layers` decoder layers of `hidden_size`. Raises ModelError."""

    def token_id(key: str) -> int:
        value = values.integer(key, minimum=0)
        if value >= vocab_size:
            raise values.error(key, f"is {value}; the vocabulary has {vocab_size} tokens")
        return value

    raw = values.values.get("vision_config")
    if not isinstance(raw, dict):
        raise values.error("vision_config", "is missing" if raw is None else f"is {raw!r}; an object is needed")
    tower = Values(raw, values.file, prefix="vision_config.")
    tower.choice("hidden_act", ("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    depth = tower.integer("depth")
    deepstack = raw.get("deepstack_visual_indexes", [8, 16, 24])
    if not isinstance(deepstack, list) or not all(isinstance(i, int) and 0 <= i < depth for i in deepstack):
        raise tower.error("deepstack_visual_indexes", f"is {deepstack!r}; a list of layers below {depth} is needed")
    if sorted(set(deepstack)) != deepstack or len(deepstack) >= num_layers:
        raise tower.error(
            "deepstack_visual_indexes", f"is {deepstack}; ascending layers, fewer than {num_layers}, are needed"
        )
    width, num_heads = tower.integer("hidden_size"), tower.integer("num_heads")
    if width % num_heads or width // num_heads % 4:
        raise tower.error("hidden_size", f"is {width}; a multiple of 4 for each of {num_heads} heads is needed")
    num_positions = tower.integer("num_position_embeddings")
    if round(num_positions**0.5) ** 2 != num_positions:
        raise tower.error("num_position_embeddings", f"is {num_positions}; the square of a grid's side is needed")
    out_hidden_size = tower.integer("out_hidden_size")
    if out_hidden_size != hidden_size:
        raise tower.error("out_hidden_size", f"is {out_hidden_size}; the decoder's hidden_size is {hidden_size}")
    if tower.integer("in_channels", default=3) != 3:
        raise tower.error("in_channels", "is not 3; images have red, green and blue")
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise tower.error("rope_parameters", f"is {rope!r}; an object is needed")
    inner = Values(rope, values.file, prefix="vision_config.rope_parameters.")
    inner.choice("rope_type", ("default", "axial"), default="axial")
    return VisionConfig(
        num_layers=depth,
        hidden_size=width,
        intermediate_size=tower.integer("intermediate_size"),
        num_heads=num_heads,
        in_channels=3,
        patch_size=tower.integer("patch_size"),
        temporal_patch_size=tower.integer("temporal_patch_size", default=2),
        merge_size=tower.integer("spatial_merge_size", default=2),
        out_hidden_size=out_hidden_size,
        num_positions=num_positions,
        deepstack_layers=tuple(deepstack),
        rope_theta=inner.optional_number("rope_theta") or tower.number("rope_theta", default=10000.0),
        image_token_id=token_id("image_token_id"),
        video_token_id=token_id("video_token_id"),
        vision_start_id=token_id("vision_start_token_id"),
        vision_end_id=token_id("vision_end_token_id"),
    )
