"""What computing a token costs, from a model's shape alone. Counts products and attention; all else is small beside.

Imports no torch.
"""

from __future__ import annotations

import math

from aiexport_edge.engine.models.config import ModelConfig


def layer_weights(config: ModelConfig, layer: int, *, active: bool) -> int:
    """Weights of a layer's products. `active`: of a mixture, those of the experts that one token takes."""
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.hidden_size * (2 * q_rows + 2 * kv_rows)
    mixture = config.mixture
    if mixture is None or layer not in mixture.layers:
        return attention + 3 * config.hidden_size * config.intermediate_size
    experts = mixture.top_k if active else mixture.num_experts
    router = config.hidden_size * mixture.num_experts
    return attention + router + 3 * config.hidden_size * mixture.intermediate_size * experts


def attention_span(config: ModelConfig) -> float:
    """The position at which a token's attention takes as many operations as its products: infinite where every layer
    sees a window only. The head is left out, since few tokens of a prompt go through it.
    """
    num_full = sum(window == 0 for window in config.sliding_windows)
    if not num_full:
        return math.inf
    products = sum(2 * layer_weights(config, layer, active=True) for layer in range(config.num_layers))
    return products / (4 * config.num_q_heads * config.head_dim * num_full)
