"""From a Hugging Face directory to a decoder, and to a vision tower where the model sees.

Owns which weights make which layer; how one is read and packed is `weights.py`'s, which tensors there must be
`tensor_names.py`'s. Knows nothing of pages or requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aiexport_edge.engine.images.preprocessor import load_patch_config
from aiexport_edge.engine.models.checkpoint import open_checkpoint
from aiexport_edge.engine.models.config import ModelConfig, ModelError, Yarn
from aiexport_edge.engine.models.decoder import Decoder, Layer, MixtureOfExperts, Mlp
from aiexport_edge.engine.models.rope import cos_sin_table
from aiexport_edge.engine.models.tensor_names import EMBEDDING, FINAL_NORM, HEAD, ROUTER
from aiexport_edge.engine.models.vision import VisionTower
from aiexport_edge.engine.models.vision_loader import load_tower
from aiexport_edge.engine.models.weights import Progress, Weights
from aiexport_edge.kernels.linear import PackedLinear


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run. `weight_bytes` counts its parameters once, in the dtype they are served in. `tower` is of
    models that see, whose largest picture has `largest_image_patches`.
    """

    name: str
    config: ModelConfig
    decoder: Decoder
    dtype: torch.dtype
    context_window: int
    weight_bytes: int
    tower: VisionTower | None = None
    fp8_kv_cache: bool = False  # keys and values as codes of E4M3
    note: str = ""  # what of the weights' form the device lacks, a sentence for the operator
    largest_image_patches: int = 0

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the caches' elements."""
        return torch.uint8 if self.fp8_kv_cache else self.dtype


def load_model(
    directory: Path | str,
    *,
    name: str = "",
    dtype: str = "auto",
    quantize: str = "none",
    kv_cache_dtype: str = "auto",
    context_window: int = 0,
    deterministic: bool = False,
    device: torch.device | None = None,
    yarn: Yarn | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Read `directory`. `context_window` 0 is the model's own, `yarn` extends that; `progress` is told bytes done and
    in all. `quantize` ("int8", "int4", "fp8") rounds the products' weights while they are packed. `kv_cache_dtype`
    "fp8" keeps keys and values in E4M3, with the checkpoint's scales or 1; "auto" does so for checkpoints that are made
    for it.

    Raises ModelError with a sentence for the operator.
    """
    directory = Path(directory)
    device = device or torch.device("cpu")
    config = ModelConfig.load(directory, yarn=yarn)
    if context_window > config.context_window:
        raise ModelError(
            f"{directory}: a context window of {context_window} tokens is more than the model's {config.context_window}"
        )
    with open_checkpoint(directory) as checkpoint:
        weights = Weights(
            checkpoint,
            config,
            dtype=dtype,
            quantize=quantize,
            kv_cache_dtype=kv_cache_dtype,
            device=device,
            progress=progress,
        )
        decoder = _build(weights, context_window or config.context_window, deterministic)
        tower, largest_image_patches = None, 0
        if config.vision is not None:
            images = load_patch_config(directory, config.vision)
            tower = load_tower(weights, config.vision, images, deterministic=deterministic)
            largest_image_patches = images.max_pixels // images.patch_size**2
    return LoadedModel(
        note=weights.note(),
        fp8_kv_cache=weights.fp8_kv_cache,
        name=name,
        config=config,
        decoder=decoder,
        dtype=weights.dtype,
        context_window=context_window or config.context_window,
        weight_bytes=weights.nbytes,
        tower=tower,
        largest_image_patches=largest_image_patches,
    )


def _build(weights: Weights, max_positions: int, deterministic: bool) -> Decoder:
    config = weights.config
    layers = [_layer(weights, index, deterministic) for index in range(config.num_layers)]
    norm = weights.parameter(FINAL_NORM)
    if config.tie_word_embeddings:
        rows = weights.rows(EMBEDDING)
        head = weights.product(rows, None, weights.rounding(EMBEDDING), deterministic=deterministic)
        # An embedding that the head gives back would lie in memory twice.
        embedding = None if head.gathers else weights.own(rows[0])
    else:
        head = weights.product(weights.weights(HEAD), None, weights.rounding(HEAD), deterministic=deterministic)
        embedding = weights.parameter(EMBEDDING)
    return Decoder(
        config,
        embedding=embedding,
        layers=layers,
        norm=norm,
        head=head,
        cos_sin=cos_sin_table(config.rope, config.head_dim, max_positions, weights.device),
        deterministic=deterministic,
    )


def _layer(weights: Weights, index: int, deterministic: bool) -> Layer:
    config = weights.config
    prefix = f"model.layers.{index}"

    def norm(name: str) -> Tensor:
        return weights.parameter(f"{prefix}.{name}.weight")

    def linear(product: str, bias: bool) -> PackedLinear:
        return weights.linear(prefix, product, bias=bias, deterministic=deterministic)

    def mlp() -> Mlp:
        return Mlp(linear("mlp.gate_up_proj", config.mlp_bias), linear("mlp.down_proj", config.mlp_bias))

    def mixture() -> MixtureOfExperts:
        assert config.mixture is not None
        experts = weights.experts(prefix, config.mixture, deterministic=deterministic)
        return MixtureOfExperts(linear(ROUTER, False), experts, config.mixture.top_k, config.mixture.normalize)

    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn.qkv_proj", config.qkv_bias),
        q_norm=norm("self_attn.q_norm") if config.qk_norm else None,
        k_norm=norm("self_attn.k_norm") if config.qk_norm else None,
        o=linear("self_attn.o_proj", config.o_bias),
        post_attention_norm=norm("post_attention_layernorm"),
        mlp=mixture() if config.mixture is not None and index in config.mixture.layers else mlp(),
        sliding_window=config.sliding_windows[index],
        k_scale=weights.kv_scale(prefix, "k_scale"),
        v_scale=weights.kv_scale(prefix, "v_scale"),
    )
