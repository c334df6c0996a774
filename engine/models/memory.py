"""What a set of models takes of a card's memory, from their shapes alone: before weights are there, and without a card.

Owns the estimate. It follows what loading does: weights, what the largest step needs, twice; graphs, pictures; the page
pool takes a share of the rest. Imports no torch. Figures are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from aiexport_edge.engine.models.config import ModelConfig
from aiexport_edge.engine.models.cost import layer_weights

# As cards report it (nvidia-smi), the least of those that are sold under the number: with ECC where it costs memory.
CARD_MIB = {8: 8188, 16: 15_900, 24: 23_028, 48: 46_068, 80: 81_050, 141: 143_771}
CARD_STEP_TOKENS = 2048  # `max_step_tokens` "auto" on a card
CONTEXT_BYTES = 600 << 20  # of the driver and its libraries, in every process that uses a card
GRAPH_BYTES = 512 << 20  # as `core/kv_memory.py` keeps them
RANK_MULTIPLE = 16  # as `kernels/lora.py` has it
TOKENS_PER_PAGE = 16  # of the model with the most bytes per token
# Bytes a weight of a product, scales included (int4: a 32-bit scale and an 8-bit zero for each group of 128; others: by
# row or block). The head is more sensitive: `models/weights.py` has its rules.
PRODUCT_BYTES = {"int8": 1.0 + 1 / 512, "int4": 0.5 + 5 / 128, "fp8": 1.0 + 1 / 512}
HEAD_BYTES = {"int8": PRODUCT_BYTES["int8"], "int4": PRODUCT_BYTES["int8"]}
SPARE_PICTURE_BYTES = 256 << 20  # beside the largest picture
LARGEST_PICTURE_TOKENS = 16_384  # of Qwen3-VL's preprocessor: 16,777,216 pixels, 32 × 32 a token


@dataclass(frozen=True, slots=True)
class Served:
    """One set of weights. `window` in tokens; `quantize` as the configuration has it; `item_bytes` of a number that is
    not rounded.
    """

    name: str
    config: ModelConfig
    quantize: str
    window: int
    item_bytes: int = 2
    kv_item_bytes: int = 0  # of a number of keys and values; 0: as `item_bytes`


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Of one set of weights. `pool_tokens`: what the whole pool holds for it; a request of its whole window takes
    `request_bytes`.
    """

    name: str
    num_parameters: int
    weight_bytes: int
    token_bytes: int
    window: int
    request_bytes: int
    pool_tokens: int

    @property
    def fits(self) -> bool:
        """Whether a request of the whole window can ever run."""
        return self.window <= self.pool_tokens


@dataclass(frozen=True, slots=True)
class CardMemory:
    """All of a card. `pool_bytes` is negative where not even what serves without pages fits."""

    card_bytes: int
    models: tuple[ModelMemory, ...]
    step_bytes: int
    picture_bytes: int
    pool_bytes: int
    adapter_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        return sum(model.weight_bytes for model in self.models)

    @property
    def fits(self) -> bool:
        """Whether every model can serve its whole window."""
        return self.pool_bytes > 0 and all(model.fits for model in self.models)


def card_memory(
    served: Sequence[Served],
    card_bytes: int,
    *,
    max_num_running: int,
    max_step_tokens: int,
    memory_share: float,
    pool_bytes: int = 0,
    adapter_slots: int = 0,
    max_adapter_rank: int = 0,
    max_image_tokens: int = 0,
) -> CardMemory:
    """The estimate. `max_step_tokens` 0 and `pool_bytes` 0 as in the configuration: chosen by the engine."""
    tokens = max_step_tokens or CARD_STEP_TOKENS
    step = max(step_bytes(each, tokens, max_num_running) for each in served)
    pictures = picture_bytes(served, max_image_tokens)
    weights = [weight_bytes(each.config, each.quantize, each.item_bytes) for each in served]
    tables = [each.window * each.config.head_dim * 4 for each in served]  # of rotary embedding, float32
    adapters = sum(adapter_bytes(each, adapter_slots, max_adapter_rank) for each in served)
    rest = card_bytes - CONTEXT_BYTES - GRAPH_BYTES - 2 * step - pictures - adapters - sum(weights) - sum(tables)
    pool = min(pool_bytes or int(memory_share * rest), rest)
    token_bytes = [each.config.kv_bytes_per_token(each.kv_item_bytes or each.item_bytes) for each in served]
    page_bytes = TOKENS_PER_PAGE * max(token_bytes)
    num_pages = max(0, pool // page_bytes - 1)  # page 0 is for padding
    models = []
    for each, of_weights, of_token, of_table in zip(served, weights, token_bytes, tables, strict=True):
        per_page = page_bytes // of_token
        models.append(
            ModelMemory(
                name=each.name,
                num_parameters=num_parameters(each.config),
                weight_bytes=of_weights + of_table,
                token_bytes=of_token,
                window=each.window,
                request_bytes=math.ceil(each.window / per_page) * page_bytes,
                pool_tokens=num_pages * per_page,
            )
        )
    return CardMemory(card_bytes, tuple(models), 2 * step, pictures, pool, adapters)


def num_parameters(config: ModelConfig) -> int:
    """Of the whole model, each counted once."""
    return _products(config) + _head(config) + _embedding(config) + _rest(config) + vision_parameters(config)


def weight_bytes(config: ModelConfig, quantize: str, item_bytes: int = 2) -> int:
    """As they are served: products rounded, routers, norms, the vision tower and a lookup-only embedding not; nor is
    the head of most checkpoints that come quantized.
    """
    heads = HEAD_BYTES
    if config.quantization is not None:
        quantize, heads = config.quantization.rounding, {}
    routers = _routers(config)
    exact = routers + _embedding(config) + _rest(config) + vision_parameters(config)
    product = PRODUCT_BYTES.get(quantize, item_bytes)
    head = heads.get(quantize, item_bytes)
    return int((_products(config) - routers) * product + _head(config) * head + exact * item_bytes)


def step_bytes(served: Served, num_tokens: int, num_rows: int) -> int:
    """What the largest step holds at once: the widest layer of `num_tokens`, twice the float32 logits of `num_rows`."""
    config = served.config
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    widest = 3 * config.intermediate_size
    if config.mixture is not None:
        widest = config.mixture.top_k * (3 * config.mixture.intermediate_size + 2 * config.hidden_size)
    layer = 4 * config.hidden_size + max(2 * q_rows + 2 * kv_rows, widest)
    return num_tokens * layer * served.item_bytes + 2 * num_rows * config.vocab_size * 4


def picture_bytes(served: Sequence[Served], max_tokens: int = 0) -> int:
    """What is kept of pictures' features, the largest one's and some more, and what that one takes in the tower.
    `max_tokens` of a picture are sent at most; 0: as many as its model's own bound allows.
    """
    kept = passing = 0
    for each in served:
        vision = each.config.vision
        if vision is None:
            continue
        tokens = min(LARGEST_PICTURE_TOKENS, max_tokens or LARGEST_PICTURE_TOKENS, each.window)
        kept = max(kept, tokens * (1 + len(vision.deepstack_layers)) * each.config.hidden_size * each.item_bytes)
        # Pixels and patches; hidden states, two sets of queries, keys and values.
        patch = 9 * vision.patch_size**2 + 7 * vision.hidden_size * each.item_bytes
        passing = max(passing, tokens * vision.merge_size**2 * patch)
    return kept + min(kept, SPARE_PICTURE_BYTES) + passing


def adapter_bytes(served: Served, num_slots: int, max_rank: int) -> int:
    """What is kept free for low-rank adapters: the factors of every product that may have them (`kernels/lora.py`)."""
    config = served.config
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = (3 * hidden + q_rows + 2 * kv_rows) + (q_rows + hidden)
    dense = (2 * hidden + 2 * inner) + (inner + hidden)
    num_sparse = len(config.mixture.layers) if config.mixture is not None else 0
    rank = math.ceil(max_rank / RANK_MULTIPLE) * RANK_MULTIPLE
    numbers = config.num_layers * attention + (config.num_layers - num_sparse) * dense
    return num_slots * rank * numbers * served.item_bytes


def vision_parameters(config: ModelConfig) -> int:
    """Of the vision tower, biases and mergers included."""
    vision = config.vision
    if vision is None:
        return 0
    width, inner = vision.hidden_size, vision.intermediate_size
    layer = 4 * width + (3 * width + 1) * width + width * width + 3 * width + 2 * width * inner + inner + width
    merged = width * vision.merge_size**2
    projection = merged * merged + merged + merged * vision.out_hidden_size + vision.out_hidden_size
    mergers = projection + 2 * width + len(vision.deepstack_layers) * (projection + 2 * merged)
    embedding = width * (vision.patch_elements + 1) + vision.num_positions * width
    return embedding + vision.num_layers * layer + mergers


def _products(config: ModelConfig) -> int:
    return sum(layer_weights(config, layer, active=False) for layer in range(config.num_layers))


def _routers(config: ModelConfig) -> int:
    mixture = config.mixture
    return 0 if mixture is None else len(mixture.layers) * mixture.num_experts * config.hidden_size


def _head(config: ModelConfig) -> int:
    return config.vocab_size * config.hidden_size


def _embedding(config: ModelConfig) -> int:
    """That is looked up and is not the head too."""
    return 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size


def _rest(config: ModelConfig) -> int:
    """Norms, and biases."""
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer = 2 * config.hidden_size + 2 * config.head_dim * config.qk_norm
    layer += (q_rows + 2 * kv_rows) * config.qkv_bias + config.hidden_size * config.o_bias
    layer += (2 * config.intermediate_size + config.hidden_size) * config.mlp_bias
    return config.num_layers * layer + config.hidden_size
