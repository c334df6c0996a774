"""The vision tower of Qwen3-VL: patches of images to features that stand where image tokens are.

    patches ─embed + interpolated positions─▶ layers (2-D rotary, attention within an image) ─merge 2x2─▶ features
                                                  └─ after some layers, merged too ─▶ DeepStack features

Attention has no cache and no causal order, so this is plain PyTorch over packed products; one layer of one group of
images at a time (`Encoding.advance`), so that whoever runs it can do other work in between. Knows no files.
Qwen3-VL technical report, 2025; DeepStack: L. Meng et al., 2024 (arXiv 2406.04334).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from aiexport_edge.engine.models.vision_config import Grid, VisionConfig
from aiexport_edge.kernels.linear import PackedLinear

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class VisionLayer:
    """Norms are (weight, bias) of [hidden_size]."""

    attention_norm: tuple[Tensor, Tensor]
    qkv: PackedLinear
    out: PackedLinear
    mlp_norm: tuple[Tensor, Tensor]
    up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, slots=True)
class Merger:
    """merge_size² neighbours to one feature; norms each of them, or all together where its norm is that long."""

    norm: tuple[Tensor, Tensor]
    up: PackedLinear
    down: PackedLinear

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden [N, hidden_size], merged neighbours next to each other -> [N / merge_size², out_hidden_size]."""
        weight, bias = self.norm
        if weight.shape[0] == self.up.in_features:
            hidden = hidden.reshape(-1, self.up.in_features)
        hidden = functional.layer_norm(hidden, weight.shape, weight, bias, LAYER_NORM_EPS)
        return self.down(functional.gelu(self.up(hidden.reshape(-1, self.up.in_features))))


@dataclass(frozen=True, slots=True)
class Features:
    """What images become, one after the other: [M, out_hidden_size], and for each DeepStack layer as much again."""

    tokens: Tensor
    deepstack: tuple[Tensor, ...]


class VisionTower:
    """Weights and the order of operations. `activation` is the layers' own: GELU in its tanh form in every release."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        patch_embedding: PackedLinear,
        positions: Tensor,
        layers: Sequence[VisionLayer],
        merger: Merger,
        deepstack_mergers: Sequence[Merger],
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        """positions [num_positions, hidden_size], rows of the learned grid one after the other."""
        self.config = config
        self._patch_embedding = patch_embedding
        self._positions = positions
        self._layers = tuple(layers)
        self._merger = merger
        self._deepstack_mergers = tuple(deepstack_mergers)
        self._activation = activation

    def begin(self, patches: Tensor, grids: Sequence[Grid]) -> Encoding:
        """Start on images. patches [N, patch_elements] in the tower's dtype, of `grids` one after the other.

        Within an image, patches go by merged squares: row of squares, column of squares, row and column in the square.
        """
        config = self.config
        assert patches.shape == (sum(rows * columns for rows, columns in grids), config.patch_elements)
        places = torch.cat([_places(grid, config.merge_size) for grid in grids]).to(patches.device)
        hidden = self._patch_embedding(patches)
        interpolated = torch.cat([self._interpolate(grid) for grid in grids])
        hidden = hidden + interpolated.to(hidden.dtype)
        return Encoding(self, hidden, self._rotation(places), [rows * columns for rows, columns in grids])

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> Features:
        """All at once; see `begin`."""
        encoding = self.begin(patches, grids)
        while encoding.advance():
            pass
        return encoding.features

    def _interpolate(self, grid: Grid) -> Tensor:
        """float32 [rows * columns, hidden_size]: the learned grid stretched bilinearly to this one."""
        side = round(self.config.num_positions**0.5)
        device = self._positions.device
        (low_y, high_y, part_y), (low_x, high_x, part_x) = (_stretch(size, side, device) for size in grid)
        learned = self._positions.float().view(side, side, -1)
        part_y, part_x = part_y[:, None, None], part_x[None, :, None]
        rows = [learned[y][:, low_x] * (1 - part_x) + learned[y][:, high_x] * part_x for y in (low_y, high_y)]
        whole = rows[0] * (1 - part_y) + rows[1] * part_y
        return _by_squares(whole, self.config.merge_size)

    def _rotation(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin float32 [N, 1, head_dim] of places [N, 2]: rows turn the first quarter, columns the second."""
        head_dim = self.config.hidden_size // self.config.num_heads
        quarter = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=places.device)
        frequencies = self.config.rope_theta ** -(quarter / (head_dim // 2))
        angles = (places[:, :, None].float() * frequencies).flatten(1)
        angles = torch.cat((angles, angles), dim=1)[:, None]
        return angles.cos(), angles.sin()

    def _layer(self, index: int, hidden: Tensor, rotation: tuple[Tensor, Tensor], lengths: Sequence[int]) -> Tensor:
        layer, config = self._layers[index], self.config
        weight, bias = layer.attention_norm
        normed = functional.layer_norm(hidden, weight.shape, weight, bias, LAYER_NORM_EPS)
        q, k, v = layer.qkv(normed).view(hidden.shape[0], 3, config.num_heads, -1).unbind(1)
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        attended = []
        for one_q, one_k, one_v in zip(*(torch.split(each, list(lengths)) for each in (q, k, v)), strict=True):
            heads = (each.transpose(0, 1)[None] for each in (one_q, one_k, one_v))
            attended.append(functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1))
        hidden = hidden + layer.out(torch.cat(attended).reshape(hidden.shape[0], -1))
        weight, bias = layer.mlp_norm
        normed = functional.layer_norm(hidden, weight.shape, weight, bias, LAYER_NORM_EPS)
        return hidden + layer.down(self._activation(layer.up(normed)))


class Encoding:
    """Images on their way through the tower. `features` is there once `advance` has returned False."""

    features: Features

    def __init__(
        self, tower: VisionTower, hidden: Tensor, rotation: tuple[Tensor, Tensor], lengths: Sequence[int]
    ) -> None:
        self._tower = tower
        self._hidden = hidden
        self._rotation = rotation
        self._lengths = lengths
        self._next = 0
        self._deepstack: list[Tensor] = []

    def advance(self) -> bool:
        """Compute one layer, or the merge after the last; False once all is done."""
        tower = self._tower
        if self._next == tower.config.num_layers:
            self.features = Features(tower._merger(self._hidden), tuple(self._deepstack))
            return False
        self._hidden = tower._layer(self._next, self._hidden, self._rotation, self._lengths)
        if self._next in tower.config.deepstack_layers:
            merger = tower._deepstack_mergers[tower.config.deepstack_layers.index(self._next)]
            self._deepstack.append(merger(self._hidden))
        self._next += 1
        return True


def _by_squares(whole: Tensor, merge_size: int) -> Tensor:
    """[rows, columns, …] in the order of patches: [rows * columns, …]."""
    rows, columns = whole.shape[:2]
    squares = whole.view(rows // merge_size, merge_size, columns // merge_size, merge_size, *whole.shape[2:])
    return squares.transpose(1, 2).flatten(0, 3)


def _places(grid: Grid, merge_size: int) -> Tensor:
    """Row and column of each patch, int64 [rows * columns, 2]."""
    rows, columns = grid
    place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    return _by_squares(place, merge_size)


def _stretch(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `size` places the two of `side` that it lies between, and how far it is from the first."""
    at = torch.linspace(0, side - 1, size, dtype=torch.float32, device=device)
    low = at.long()
    return low, (low + 1).clamp(max=side - 1), at - low


def _rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """heads [N, num_heads, head_dim], the first half paired with the second; float32 inside."""
    cos, sin = rotation
    wide = heads.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)
