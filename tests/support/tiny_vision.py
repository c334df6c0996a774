"""Small Qwen3-VL models with random weights, made and saved by transformers, pictures for them, and what transformers
says about both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from support.tiny_models import VOCABULARY, PreTrainedModel

from aiexport_edge.engine.core.protocol import ImageInput
from aiexport_edge.engine.images.patches import PatchConfig, patches
from aiexport_edge.engine.images.preprocessor import load_patch_config
from aiexport_edge.engine.models.vision_config import Grid

IMAGE, VIDEO, START, END = 380, 381, 382, 383
PATCH, MERGE = 4, 2
MOST_PIXELS = 24 * 24 * PATCH**2
LARGEST = (24, 24)  # patches

_TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 150,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
_MIXTURE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
_IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": MOST_PIXELS},
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.5, 0.25, 0.4],
}


def make_vision(name: str) -> PreTrainedModel:
    """The model "qwen3_vl" (tied embeddings) or "qwen3_vl_moe" (untied); greedy tokens have clear winners."""
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    if name == "qwen3_vl":
        config: Any = Qwen3VLConfig(text_config=_TEXT, vision_config=_VISION, tie_word_embeddings=True, **_IDS)
        model: PreTrainedModel = Qwen3VLForConditionalGeneration(config)
    else:
        config = Qwen3VLMoeConfig(
            text_config=_TEXT | _MIXTURE, vision_config=_VISION, tie_word_embeddings=False, **_IDS
        )
        model = Qwen3VLMoeForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(21)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.2 * noise)
            else:
                fan_in = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()
                parameter.copy_(noise * (1.6 / fan_in**0.5))
    model.eval()
    return model


def save_vision(name: str, directory: Path, *, released_layout: bool = True) -> Path:
    """Write the model `name` as a Hugging Face directory. `released_layout`: the experts as the family was released,
    else as transformers 5 writes a model of its own making."""
    make_vision(name).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    file = directory / "model.safetensors"
    if name == "qwen3_vl_moe" and released_layout:
        tensors = safetensors.torch.load_file(file)
        for key, tensor in tensors.items():
            if ".mlp.experts." in key:
                tensors[key] = tensor.transpose(1, 2).contiguous()
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return directory


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and the pictures among them."""

    ids: list[int]
    images: list[ImageInput]


def picture(grid: Grid, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3]: a shape on noise, so that pictures of one size differ."""
    height, width = grid[0] * PATCH, grid[1] * PATCH
    generator = np.random.default_rng((seed, *grid))
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = generator.integers(0, 256, 3)
    return pixels


def prompt(*parts: Sequence[int] | npt.NDArray[np.uint8]) -> Prompt:
    """Text as ids and pictures, one after the other, as the family's processor expands them."""
    ids: list[int] = []
    images: list[ImageInput] = []
    for part in parts:
        if isinstance(part, np.ndarray):
            rows, columns = part.shape[0] // PATCH, part.shape[1] // PATCH
            data = part.tobytes()
            digest = hashlib.blake2b(b"%d %d " % (rows, columns) + data, digest_size=32).digest()
            images.append(ImageInput(len(ids) + 1, rows, columns, digest, data))
            ids += [START, *[IMAGE] * (rows * columns // MERGE**2), END]
        else:
            ids += part
    return Prompt(ids, images)


def inputs_of(given: Prompt, config: PatchConfig) -> dict[str, Any]:
    """What transformers' model takes for a prompt."""
    ids = torch.tensor([given.ids])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if given.images:
        of_images = []
        for image in given.images:
            pixels = np.frombuffer(image.pixels, np.uint8).reshape(image.rows * PATCH, image.columns * PATCH, 3)
            of_images.append(torch.from_numpy(patches(pixels, config)[0]))
        inputs |= {
            "pixel_values": torch.cat(of_images),
            "image_grid_thw": torch.tensor([(1, image.rows, image.columns) for image in given.images]),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    return inputs


@torch.inference_mode()
def greedy_vision(
    model: PreTrainedModel, directory: Path, given: Prompt, num_tokens: int
) -> tuple[list[int], torch.Tensor]:
    """What transformers generates greedily: its ids, and the float32 logits [num_tokens, vocabulary] behind them."""
    output = model.generate(
        **inputs_of(given, load_patch_config(directory)),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=-1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(given.ids) :].tolist(), torch.cat(output.logits).float()
