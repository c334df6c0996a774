"""Positions of prompts with pictures against transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiexport_edge.engine.images.positions import ImageSpan, prompt_positions

MERGE = 2


def transformers_positions(num_tokens: int, spans: list[ImageSpan]) -> tuple[Any, int]:
    from transformers import Qwen3VLConfig, Qwen3VLModel

    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    config = Qwen3VLConfig(
        text_config=tiny | {"num_key_value_heads": 1, "vocab_size": 10},
        vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8},
    )
    kinds = torch.zeros(1, num_tokens, dtype=torch.int32)
    for span in spans:
        kinds[0, span.start : span.end] = 1
    grids = torch.tensor([(1, MERGE * span.rows, MERGE * span.columns) for span in spans])
    model: Any = Qwen3VLModel(config)
    positions, delta = model.get_rope_index(
        torch.zeros(1, num_tokens, dtype=torch.long), kinds, image_grid_thw=grids if spans else None
    )
    return positions[:, 0].numpy(), int(delta)


@pytest.mark.parametrize(
    ("num_tokens", "spans"),
    [
        (7, []),
        (30, [ImageSpan(3, 4, 5)]),
        (40, [ImageSpan(0, 2, 9), ImageSpan(20, 3, 3), ImageSpan(30, 1, 10)]),
        (12, [ImageSpan(6, 6, 1)]),
    ],
    ids=str,
)
def test_positions_match_transformers(num_tokens: int, spans: list[ImageSpan]) -> None:
    expected, shift = transformers_positions(num_tokens, spans)
    positions = prompt_positions(num_tokens, spans)
    assert positions.of_prompt.tolist() == expected.tolist()
    assert positions.shift == shift
