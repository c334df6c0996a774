"""Tokenizers of every kind, made once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.tiny_tokenizers import MAKERS, LoadedTokenizers, save_tokenizer
from tokenizers import Tokenizer as HFTokenizer

from aiexport_edge.engine.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face directory with a tokenizer and its template, by kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save_tokenizer(kind, root / kind) for kind in MAKERS}


@pytest.fixture(scope="session")
def loaded(directories: dict[str, Path]) -> LoadedTokenizers:
    """Our tokenizer and the library's, by kind."""
    return LoadedTokenizers(
        (kind, (Tokenizer.load(path), HFTokenizer.from_file(str(path / "tokenizer.json"))))
        for kind, path in directories.items()
    )


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real trained Llama's directory."""
    default = Path(__file__).resolve().parents[4] / "shared" / "data"
    directory = Path(os.environ.get("AIEXPORT_TEST_DATA", default)) / "models" / "stories260K"
    if not directory.is_dir():
        pytest.skip(f"no test data at {directory}; set AIEXPORT_TEST_DATA")
    return directory
