"""The vision tower of Qwen3-VL as a plain torch module for training, its parameters named as in the checkpoint.

The arithmetic is that of ``transformers``' ``Qwen3VLVisionModel`` (the tests hold one to the other). What differs is
that pictures come in groups of one size, and that the two equal frames of a still picture's patch share one weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from aiexport_edge.engine.images.patches import PatchConfig

PATCHES = PatchConfig(
    patch_size=16, temporal_patch_size=2, merge_size=2, min_pixels=96 * 96, max_pixels=96 * 128,
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip
"""A square picture becomes 96 x 96 pixels and 9 tokens; none becomes more than 12."""


def preprocessor_config() -> dict[str, Any]:
    """The ``preprocessor_config.json``."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(PATCHES.mean),
        "image_processor_type": "Qwen2VLImageProcessor",
        "image_std": list(PATCHES.std),
        "merge_size": PATCHES.merge_size,
        "patch_size": PATCHES.patch_size,
        "processor_class": "Qwen3VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": PATCHES.max_pixels, "shortest_edge": PATCHES.min_pixels},
        "temporal_patch_size": PATCHES.temporal_patch_size,
    }


@dataclass(frozen=True)
class EyesShape:
    """The dimensions of the tower. ``side`` is that of the grid of learned positions."""

    layers: int = 3
    hidden: int = 128
    heads: int = 4
    intermediate: int = 384
    out: int = 256
    side: int = 6
    deepstack: tuple[int, ...] = (1,)
    rope_theta: float = 10000.0

    def config(self) -> dict[str, Any]:
        """The ``vision_config`` of this shape."""
        return {
            "deepstack_visual_indexes": list(self.deepstack),
            "depth": self.layers,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": self.hidden,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "model_type": "qwen3_vl",
            "num_heads": self.heads,
            "num_position_embeddings": self.side**2,
            "out_hidden_size": self.out,
            "patch_size": PATCHES.patch_size,
            "spatial_merge_size": PATCHES.merge_size,
            "temporal_patch_size": PATCHES.temporal_patch_size,
        }


def patches_of(pixels: Tensor) -> Tensor:
    """float32 [B, N, 3 * 16 * 16] of uint8 [B, height, width, 3], merged squares together, normalized."""
    return squares_of(pixels.float() / 127.5 - 1, PATCHES.patch_size)


def squares_of(x: Tensor, size: int) -> Tensor:
    """[B, N, channels * size²] of [B, height, width, channels], in the order of patches of that size."""
    b, height, width, channels = x.shape
    merge = PATCHES.merge_size
    x = x.view(b, height // size // merge, merge, size, width // size // merge, merge, size, channels)
    return x.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(b, -1, channels * size * size)


def _by_squares(x: Tensor) -> Tensor:
    """[rows, columns, …] in the order of patches."""
    rows, columns = x.shape[:2]
    merge = PATCHES.merge_size
    return x.view(rows // merge, merge, columns // merge, merge, *x.shape[2:]).transpose(1, 2).flatten(0, 3)


class _Attention(nn.Module):
    def __init__(self, shape: EyesShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.proj = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (self._turned(y.float(), cos, sin).to(v.dtype) for y in (q, k))
        # Written out: for so short rows and on a processor, a third of the time that the fused one takes backward.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        o = scores.float().softmax(-1).to(v.dtype) @ v
        out: Tensor = self.proj(o.transpose(1, 2).reshape(b, n, d))
        return out

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin


class _Mlp(nn.Module):
    def __init__(self, shape: EyesShape) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(shape.hidden, shape.intermediate)
        self.linear_fc2 = nn.Linear(shape.intermediate, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))
        return out


class _Block(nn.Module):
    def __init__(self, shape: EyesShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.hidden, eps=1e-6)
        self.norm2 = nn.LayerNorm(shape.hidden, eps=1e-6)
        self.attn = _Attention(shape)
        self.mlp = _Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Merger(nn.Module):
    """Four neighbours to one feature; DeepStack's normalize them together, the last one each alone."""

    def __init__(self, shape: EyesShape, *, together: bool) -> None:
        super().__init__()
        self.wide = shape.hidden * PATCHES.merge_size**2
        self.together = together
        self.norm = nn.LayerNorm(self.wide if together else shape.hidden, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.wide, self.wide)
        self.linear_fc2 = nn.Linear(self.wide, shape.out)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = self.norm(x.reshape(b, -1, self.wide)) if self.together else self.norm(x).reshape(b, -1, self.wide)
        out: Tensor = self.linear_fc2(F.gelu(self.linear_fc1(x)))
        return out


class _PatchEmbed(nn.Module):
    def __init__(self, shape: EyesShape) -> None:
        super().__init__()
        self.proj = nn.Linear(3 * PATCHES.patch_size**2, shape.hidden)


class Eyes(nn.Module):
    """The tower, its merger and those of DeepStack."""

    def __init__(self, shape: EyesShape) -> None:
        super().__init__()
        self.shape = shape
        self.patch_embed = _PatchEmbed(shape)
        self.pos_embed = nn.Embedding(shape.side**2, shape.hidden)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.merger = _Merger(shape, together=False)
        self.deepstack_merger_list = nn.ModuleList(_Merger(shape, together=True) for _ in shape.deepstack)
        nn.init.normal_(self.pos_embed.weight, std=0.02)
        for merger in self.deepstack_merger_list:
            nn.init.zeros_(merger.linear_fc2.weight)  # type: ignore[union-attr,arg-type]

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features [B, M, out] of uint8 [B, height, width, 3], and as many for each DeepStack layer."""
        deep, x = [], pixels
        for number, x in enumerate(self.layers(pixels)):
            if number in self.shape.deepstack:
                deep.append(self.deepstack_merger_list[self.shape.deepstack.index(number)](x))
        return self.merger(x), deep

    def layers(self, pixels: Tensor) -> list[Tensor]:
        """What each layer makes of the patches, [B, N, hidden]."""
        rows, columns = pixels.shape[1] // PATCHES.patch_size, pixels.shape[2] // PATCHES.patch_size
        x = self.patch_embed.proj(patches_of(pixels)) + self._positions(rows, columns)
        cos, sin = self._rotation(rows, columns)
        found = []
        for block in self.blocks:
            x = block(x, cos, sin)
            found.append(x)
        return found

    def _positions(self, rows: int, columns: int) -> Tensor:
        side = self.shape.side
        grid = self.pos_embed.weight.view(side, side, -1)

        def stretch(size: int) -> tuple[Tensor, Tensor, Tensor]:
            at = torch.linspace(0, side - 1, size)
            low = at.long()
            return low, (low + 1).clamp(max=side - 1), at - low

        (y0, y1, dy), (x0, x1, dx) = stretch(rows), stretch(columns)
        dx, dy = dx[None, :, None], dy[:, None, None]
        upper, lower = (grid[y][:, x0] * (1 - dx) + grid[y][:, x1] * dx for y in (y0, y1))
        return _by_squares(upper * (1 - dy) + lower * dy)

    def _rotation(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        spatial = self.shape.hidden // self.shape.heads // 2
        inverse = self.shape.rope_theta ** (-torch.arange(0, spatial, 2, dtype=torch.float32) / spatial)
        places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
        angle = (_by_squares(places)[:, :, None] * inverse).flatten(1)
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the tower's weights of a model's directory: the inverse of :meth:`tensors`."""
        found = load_file(str(folder / "model.safetensors"))
        for name, p in self.state_dict().items():
            saved = found["model.visual." + name]
            if name == "patch_embed.proj.weight":
                saved = saved.float().sum(2).flatten(1)
            p.copy_(saved)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors, bfloat16."""
        found: dict[str, Tensor] = {}
        for name, p in self.state_dict().items():
            if name == "patch_embed.proj.weight":
                size, frames = PATCHES.patch_size, PATCHES.temporal_patch_size
                p = (p.view(-1, 3, 1, size, size) / frames).expand(-1, -1, frames, -1, -1)
            found["model.visual." + name] = p.detach().to(torch.bfloat16).contiguous()
        return found
