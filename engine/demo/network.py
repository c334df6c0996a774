"""Qwen3 and the decoder of Qwen3-VL as a plain torch module for training, exported in the Hugging Face layout.

The arithmetic is that of ``transformers``' ``Qwen3ForCausalLM`` and, with a tower, ``Qwen3VLForConditionalGeneration``
(the tests hold one to the other); what differs is that several conversations share a row, kept apart by the attention
mask, and that logits are made only where a loss is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .eyes import Eyes, preprocessor_config

MROPE_SECTION = (12, 10, 10)
"""How many of the frequencies turn with time, height and width (interleaved)."""


@dataclass(frozen=True)
class Shape:
    """The dimensions of the network."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 512
    rope_theta: float = 10000.0
    eps: float = 1e-6
    positions: int = 4096

    def config(self, bos: int, eos: int, pad: int) -> dict[str, Any]:
        """The ``config.json`` of this shape."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.positions,
            "max_window_layers": self.layers,
            "model_type": "qwen3",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "rope_scaling": None,
            "rope_theta": self.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.float()
    return torch.mul(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # Short rows are quicker written out, since the compiler fuses what stands between the products.
    if q.shape[2] > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = ((q * q.shape[-1] ** -0.5) @ k.mT).masked_fill(~mask, -1e9)
    return torch.matmul(scores.float().softmax(-1).to(q.dtype), v)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.input_layernorm = nn.Parameter(torch.ones(d))
        self.q_proj = nn.Parameter(torch.empty(q, d))
        self.k_proj = nn.Parameter(torch.empty(kv, d))
        self.v_proj = nn.Parameter(torch.empty(kv, d))
        self.q_norm = nn.Parameter(torch.ones(shape.head_dim))
        self.k_norm = nn.Parameter(torch.ones(shape.head_dim))
        self.o_proj = nn.Parameter(torch.empty(d, q))
        self.post_attention_layernorm = nn.Parameter(torch.ones(d))
        self.gate_proj = nn.Parameter(torch.empty(shape.intermediate, d))
        self.up_proj = nn.Parameter(torch.empty(shape.intermediate, d))
        self.down_proj = nn.Parameter(torch.empty(d, shape.intermediate))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """The residual stream after this layer."""
        s = self.shape
        b, t, _ = x.shape
        h = _norm(x, self.input_layernorm, s.eps).to(dtype)
        qkv = F.linear(h, torch.cat((self.q_proj, self.k_proj, self.v_proj)).to(dtype))
        qkv = qkv.view(b, t, s.heads + 2 * s.kv_heads, s.head_dim).transpose(1, 2)
        q, k, v = torch.split(qkv, [s.heads, s.kv_heads, s.kv_heads], 1)
        q = _rotate(_norm(q, self.q_norm, s.eps), cos, sin).to(dtype)
        k = _rotate(_norm(k, self.k_norm, s.eps), cos, sin).to(dtype)
        k, v = (y.repeat_interleave(s.heads // s.kv_heads, 1) for y in (k, v))
        o = _attend(q, k, v, mask)
        x = x + F.linear(o.transpose(1, 2).reshape(b, t, -1), self.o_proj.to(dtype))
        h = _norm(x, self.post_attention_layernorm, s.eps).to(dtype)
        gate, up = F.linear(h, torch.cat((self.gate_proj, self.up_proj)).to(dtype)).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down_proj.to(dtype))


@dataclass(frozen=True)
class Vision:
    """The tower, and the numbers of the tokens that stand for pictures."""

    eyes: Eyes
    start: int
    end: int
    image: int
    video: int

    def config(self, text: dict[str, Any]) -> dict[str, Any]:
        """The ``config.json`` of a Qwen3-VL with this tower and a decoder of that configuration."""
        unknown = ("architectures", "max_window_layers", "sliding_window", "use_sliding_window", "torch_dtype")
        inner = {key: value for key, value in text.items() if key not in unknown}
        inner["model_type"] = "qwen3_vl_text"
        inner["rope_scaling"] = {
            "mrope_interleaved": True,
            "mrope_section": list(MROPE_SECTION),
            "rope_type": "default",
        }
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "image_token_id": self.image,
            "model_type": "qwen3_vl",
            "text_config": inner,
            "tie_word_embeddings": True,
            "torch_dtype": text["torch_dtype"],
            "video_token_id": self.video,
            "vision_config": self.eyes.shape.config(),
            "vision_end_token_id": self.end,
            "vision_start_token_id": self.start,
        }


@dataclass(frozen=True)
class Seen:
    """What pictures add to a batch.

    ``places`` [M] are the flat positions of their tokens, ``features`` [M, hidden] stand there in place of embeddings,
    and ``deepstack`` of as many rows each are added after the first layers.

    ``positions`` [3, rows, length] are those of all tokens in time, height and width.
    """

    places: Tensor
    features: Tensor
    deepstack: list[Tensor]
    positions: Tensor


class Network(nn.Module):
    """The whole decoder, embeddings tied."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Parameter(torch.empty(shape.vocab, shape.hidden))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        gen = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 if "embed" in name else p.shape[1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    std *= (2 * shape.layers) ** -0.5
                with torch.no_grad():
                    p.normal_(0, std, generator=gen)

    def forward(
        self, ids: Tensor, mask: Tensor, keep: Tensor, dtype: torch.dtype = torch.float32, *, seen: Seen | None = None
    ) -> Tensor:
        """Logits at the flat positions ``keep`` of ``ids`` [rows, length].

        ``mask`` [rows, 1, length, length] says who sees whom.
        """
        s = self.shape
        inv = s.rope_theta ** (-torch.arange(0, s.head_dim, 2, dtype=torch.float32) / s.head_dim)
        x = F.embedding(ids, self.embed_tokens)
        if seen is None:
            angle = torch.outer(torch.arange(ids.shape[1], dtype=torch.float32), inv)
        else:
            angles = seen.positions[..., None] * inv
            angle = angles[0].clone()
            for axis in (1, 2):
                turned = slice(axis, 3 * MROPE_SECTION[axis], 3)
                angle[..., turned] = angles[axis][..., turned]
            angle = angle[:, None]
            x = x.flatten(0, 1).index_copy(0, seen.places, seen.features).view_as(x)
        cos, sin = angle.cos(), angle.sin()
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, dtype)
            if seen is not None and number < len(seen.deepstack):
                x = x.flatten(0, 1).index_add(0, seen.places, seen.deepstack[number]).view_as(x)
        x = x.reshape(-1, s.hidden)[keep]
        x = _norm(x, self.norm, s.eps).to(dtype)
        return F.linear(x, self.embed_tokens.to(dtype)).float()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the decoder's weights of a directory that :meth:`save` has written, with a tower or without."""
        found = load_file(str(folder / "model.safetensors"))
        for name, p in self.named_parameters():
            alone = _saved(name, "model.")
            p.copy_(found[alone] if alone in found else found[_saved(name, "model.language_model.")])

    def save(
        self, out: Path, bos: int, eos: int, pad: int, *, logit_scale: float = 1.0, vision: Vision | None = None
    ) -> None:
        """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` (bf16).

        ``logit_scale`` is folded into the final norm: drawn at temperature 1, the saved model is as sharp as this at
        ``1 / logit_scale``. Greedy answers stay as they are. With ``vision`` the directory is a Qwen3-VL.
        """
        out.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, p in self.named_parameters():
            scale = logit_scale if name == "norm" else 1.0
            saved = _saved(name, "model.language_model." if vision else "model.")
            tensors[saved] = (p.detach() * scale).to(torch.bfloat16).contiguous()
        config = self.shape.config(bos, eos, pad)
        if vision:
            tensors |= vision.eyes.tensors()
            config = vision.config(config)
            (out / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(), indent=2) + "\n")
        save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
        (out / "model.safetensors").chmod(0o644)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {
            "bos_token_id": bos, "do_sample": True, "eos_token_id": [eos, pad], "pad_token_id": pad,
            "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        }  # fmt: skip
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def _saved(name: str, prefix: str) -> str:
    """The checkpoint's name of a parameter."""
    parts = name.split(".")
    block = "self_attn." if parts[-1][:2] in ("q_", "k_", "v_", "o_") else "mlp."
    if name.endswith("layernorm") or not name.startswith("layers"):
        block = ""
    parts[-1] = block + parts[-1]
    return prefix + ".".join(parts) + ".weight"
