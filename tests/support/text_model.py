"""A model that sees as one that does not: its language model alone, under the names of its family without eyes.

vLLM for processors often has no torchvision, which vLLM wants for models that see (`test_vllm_pictures.py`); text
needs none of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

_TEXT = {"Qwen3VLForConditionalGeneration": ("Qwen3ForCausalLM", "qwen3")}


def text_only(directory: Path, target: Path) -> Path:
    """`directory` itself where it holds no model that sees, else `target`, filled."""
    config = json.loads((directory / "config.json").read_text())
    if "vision_config" not in config:
        return directory
    architecture, model_type = _TEXT[config["architectures"][0]]
    text = config["text_config"]
    rope = text.pop("rope_parameters", None) or text.pop("rope_scaling", None) or {}
    text.pop("rope_scaling", None)
    # Three equal rows of positions, as text has them, turn as one does.
    text |= {"rope_theta": text.get("rope_theta") or rope.get("rope_theta", 10000.0), "rope_scaling": None}
    text |= {"architectures": [architecture], "model_type": model_type}
    text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    text["torch_dtype"] = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    target.mkdir(parents=True)
    for file in directory.iterdir():
        if file.name not in ("config.json", "preprocessor_config.json") and file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)
    (target / "config.json").write_text(json.dumps(text))
    for file in sorted(directory.glob("*.safetensors")):
        tensors = {
            name.replace("model.language_model.", "model."): tensor
            for name, tensor in load_file(file).items()
            if not name.startswith("model.visual.")
        }
        if tensors:
            save_file(tensors, target / file.name, metadata={"format": "pt"})
    return target
