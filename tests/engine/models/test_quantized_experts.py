"""Mixtures whose experts are quantized, in the layouts that they are released in: as one tensor for all experts of a
layer, in either order, or each expert by itself, also in a model that sees.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.decoding import logits_of
from support.quantized_models import Tensors, fp8, set_quantization
from support.tiny_vision import save_vision

from aiexport_edge.engine.models.config import ModelError
from aiexport_edge.engine.models.loader import load_model

BLOCK = (16, 16)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
LAYOUTS = ("as it is", "transposed", "apart")


def layout_of(name: str, weight: torch.Tensor, layout: str) -> tuple[Tensors, torch.Tensor]:
    """A layer's `name` [experts, N, K] as the checkpoint has it, and the numbers that it stands for."""
    packed = [fp8(expert, BLOCK, "scales") for expert in weight]
    wide = torch.stack([each for _, each in packed])
    if layout != "apart":
        codes = torch.stack([stored["weight"].view(torch.uint8) for stored, _ in packed])
        scales = torch.stack([stored["scales"] for stored, _ in packed])
        if layout == "transposed":
            codes, scales = codes.transpose(1, 2), scales.transpose(1, 2)
        return {name: codes.contiguous().view(torch.float8_e4m3fn), f"{name}_scale_inv": scales.contiguous()}, wide
    tensors: Tensors = {}
    prefix, _, which = name.rpartition(".")
    for number, expert in enumerate(weight):
        parts = {"down_proj": expert}
        if which == "gate_up_proj":
            parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
        for part, own in parts.items():
            stored, _ = fp8(own, BLOCK, "weight_scale_inv")
            tensors |= {f"{prefix}.{number}.{part}.{role}": value for role, value in stored.items()}
    if which == "gate_up_proj":  # blocks begin anew with the up rows
        wide = torch.stack([torch.cat([fp8(half, BLOCK, "")[1] for half in expert.chunk(2)]) for expert in weight])
    return tensors, wide


def save(directory: Path, layout: str) -> Path:
    """The model with quantized experts in `directory`; with the same numbers in float32 in the one that is returned."""
    save_vision("qwen3_vl_moe", directory, released_layout=False)
    plain = save_vision("qwen3_vl_moe", directory.parent / "plain", released_layout=False)
    tensors = load_file(directory / "model.safetensors")
    wide: Tensors = {}
    for name in [name for name in tensors if ".mlp.experts." in name]:
        stored, wide[name] = layout_of(name, tensors.pop(name), layout)
        tensors |= stored
    assert wide
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    save_file(load_file(plain / "model.safetensors") | wide, plain / "model.safetensors", {"format": "pt"})
    set_quantization(directory, FP8)
    return plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_of_a_model_that_sees(layout: str, tmp_path: Path) -> None:
    plain = save(tmp_path / "model", layout)
    ids = torch.randint(3, 370, (24,), generator=torch.Generator().manual_seed(5))
    model, expected = load_model(tmp_path / "model"), load_model(plain)
    torch.testing.assert_close(logits_of(model, ids), logits_of(expected, ids), rtol=1e-4, atol=1e-4)
    experts = model.config.mixture
    assert experts is not None
    assert f"{2 * experts.num_experts * len(experts.layers)} of " in model.note
    assert model.weight_bytes < expected.weight_bytes


def test_progress_comes_to_an_end(tmp_path: Path) -> None:
    save(tmp_path / "model", "transposed")
    said: list[tuple[int, int]] = []
    load_model(tmp_path / "model", progress=lambda done, total: said.append((done, total)))
    assert said[0][0] == 0
    assert all(before[0] <= after[0] for before, after in pairwise(said))
    assert 0.999 * said[-1][1] <= said[-1][0] <= said[-1][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "gate_up_proj is F8_E4M3, and has no .*gate_up_proj_scale_inv beside it"),
        ("shape", r"gate_up_proj has shape \[8, 80, 64\] and its scales \[8, 5, 3\]; config.json asks for"),
        ("number", "gate_up_proj: a scale has numbers that are not finite"),
    ],
)
def test_torn_experts_are_refused(change: str, message: str, tmp_path: Path) -> None:
    save(tmp_path / "model", "as it is")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("experts.gate_up_proj_scale_inv"))
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][..., :3].contiguous()
    else:
        tensors[name][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "model")
