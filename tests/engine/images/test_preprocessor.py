"""What `preprocessor_config.json` says, in the forms in which directories have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aiexport_edge.engine.images.preprocessor import load_patch_config
from aiexport_edge.engine.models.config_values import ModelError

QWEN3_VL: dict[str, Any] = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


def written(directory: Path, values: Any, name: str = "preprocessor_config.json") -> Path:
    (directory / name).write_text(json.dumps(values))
    return directory


def test_the_form_of_qwen3_vl(tmp_path: Path) -> None:
    config = load_patch_config(written(tmp_path, QWEN3_VL))
    assert (config.patch_size, config.merge_size, config.temporal_patch_size) == (16, 2, 2)
    assert (config.min_pixels, config.max_pixels) == (65536, 16777216)
    assert config.mean == config.std == (0.5, 0.5, 0.5)


def test_min_and_max_pixels_go_before_size(tmp_path: Path) -> None:
    config = load_patch_config(written(tmp_path, {**QWEN3_VL, "min_pixels": 4096, "max_pixels": 8192}))
    assert (config.min_pixels, config.max_pixels) == (4096, 8192)
    named_so = {"min_pixels": 4096, "max_pixels": 1 << 20}  # Qwen2.5-VL
    config = load_patch_config(written(tmp_path, {**QWEN3_VL, "size": named_so}))
    assert (config.min_pixels, config.max_pixels) == (4096, 1 << 20)


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    made: Any = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 4096})
    made.save_pretrained(tmp_path)
    config = load_patch_config(tmp_path)
    assert (config.patch_size, config.min_pixels, config.max_pixels) == (4, 64, 4096)
    assert list(config.mean) == list(made.image_mean)


def test_the_whole_processor_in_one_file(tmp_path: Path) -> None:
    written(tmp_path, {"processor_class": "Qwen3VLProcessor", "image_processor": QWEN3_VL}, "processor_config.json")
    assert load_patch_config(tmp_path).patch_size == 16


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImageProcessor'"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"merge_size": "2"}, "merge_size is '2'"),
        ({"size": 448}, "size is 448"),
        ({"size": {"shortest_edge": -1}}, "size.shortest_edge is -1"),
        ({"max_pixels": 5}, "max_pixels"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"do_resize": False}, "do_resize is not true"),
        ({"resample": 0}, "resample is 0"),
        ({"rescale_factor": 2.0}, "rescale_factor is 2.0"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError) as raised:
        load_patch_config(written(tmp_path, {**QWEN3_VL, **change}))
    assert complaint in str(raised.value)
    assert "preprocessor_config.json" in str(raised.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"preprocessor_config\.json does not exist"):
        load_patch_config(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1")
    with pytest.raises(ModelError, match="is not JSON"):
        load_patch_config(tmp_path)
