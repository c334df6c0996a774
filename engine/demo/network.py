"""Qwen3 as a plain torch module for training, exported in the Hugging Face layout.

The arithmetic is that of ``transformers``' ``Qwen3ForCausalLM`` (the tests hold one to the other); what differs is that
several conversations share a row, kept apart by the attention mask, and that logits are made only where a loss is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


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

    def forward(self, ids: Tensor, mask: Tensor, keep: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits at the flat positions ``keep`` of ``ids`` [rows, length].

        ``mask`` [rows, 1, length, length] says who sees whom.
        """
        s = self.shape
        inv = s.rope_theta ** (-torch.arange(0, s.head_dim, 2, dtype=torch.float32) / s.head_dim)
        angle = torch.outer(torch.arange(ids.shape[1], dtype=torch.float32), inv)
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(ids, self.embed_tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, dtype)
        x = x.reshape(-1, s.hidden)[keep]
        x = _norm(x, self.norm, s.eps).to(dtype)
        return F.linear(x, self.embed_tokens.to(dtype)).float()

    def save(self, out: Path, bos: int, eos: int, pad: int, *, logit_scale: float = 1.0) -> None:
        """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` (bf16).

        ``logit_scale`` is folded into the final norm: drawn at temperature 1, the saved model is as sharp as this at
        ``1 / logit_scale``. Greedy answers stay as they are.
        """
        out.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, p in self.named_parameters():
            block = "self_attn." if name.split(".")[-1][:2] in ("q_", "k_", "v_", "o_") else "mlp."
            if name.endswith("layernorm") or not name.startswith("layers"):
                block = ""
            parts = name.split(".")
            parts[-1] = block + parts[-1]
            scale = logit_scale if name == "norm" else 1.0
            tensors["model." + ".".join(parts) + ".weight"] = (p.detach() * scale).to(torch.bfloat16).contiguous()
        save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
        (out / "model.safetensors").chmod(0o644)
        (out / "config.json").write_text(json.dumps(self.shape.config(bos, eos, pad), indent=2) + "\n")
        generation = {
            "bos_token_id": bos, "do_sample": True, "eos_token_id": [eos, pad], "pad_token_id": pad,
            "temperature": 1.0, "top_p": 1.0, "top_k": 0,
        }  # fmt: skip
        (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
