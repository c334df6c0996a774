"""One tokenizer for all server tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_tokenizers import save_tokenizer


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tokenizer and a template, and nothing else."""
    return save_tokenizer("qwen3", tmp_path_factory.mktemp("model"))
