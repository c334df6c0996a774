"""The revision changes with whatever changes the model's answers, and with nothing else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.tiny_models import save

from aiexport_edge.engine.models import revision
from aiexport_edge.engine.models.revision import model_revision


def test_content_counts_and_place_does_not(tmp_path: Path) -> None:
    first = save("llama2", tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    second = tmp_path / "b"
    os.utime(second / "config.json", (0, 0))
    (second / "README.md").write_text("nothing that counts")
    expected = model_revision(first)
    assert model_revision(second) == expected
    assert len(bytes.fromhex(expected)) == 16
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        file = second / name
        before = file.read_bytes() if file.exists() else None
        file.write_bytes((before or b"") + b" ")
        assert model_revision(second) != expected
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)
    assert model_revision(second) == expected


def test_one_weight_of_a_small_file_counts(tmp_path: Path) -> None:
    directory = save("llama2", tmp_path)
    expected = model_revision(directory)
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    assert model_revision(directory) != expected


def test_a_large_file_counts_by_header_size_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revision, "WHOLE_BYTES", 0)
    directory = save("llama2", tmp_path)
    expected = model_revision(directory)
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    for changed in (content + b"\0", content[:20] + b"X" + content[21:], content[:-1] + b"\x55"):
        weights.write_bytes(changed)
        assert model_revision(directory) != expected
    weights.write_bytes(content)
    assert model_revision(directory) == expected
