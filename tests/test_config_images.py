"""`[images]`: defaults, what a file may say, what it is told where it is wrong."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from aiexport_edge.proto import config_text
from aiexport_edge.proto.config import ConfigError, load
from aiexport_edge.proto.config_images import ImagesConfig


def written(directory: Path, text: str) -> Path:
    path = directory / "aiexport-edge.toml"
    path.write_text(text)
    return path


def test_no_url_is_fetched_by_default(tmp_path: Path) -> None:
    config = load(written(tmp_path, ""), tmp_path)
    assert config.images == ImagesConfig()
    assert config.images.allow == ()


def test_every_key(tmp_path: Path) -> None:
    text = (
        '[images]\nallow = ["cdn.example.com", "10.0.0.0/8"]\nmax_bytes = "2MiB"\nmax_pixels = 1000000\nmax_count = 3\n'
        'max_tokens = 1024\nheld_bytes = "64MiB"\nworkers = 2\nfetch_timeout = "3s"\ndecode_timeout = "20s"\n'
    )
    config = load(written(tmp_path, text), tmp_path)
    assert config.images == ImagesConfig(
        allow=("cdn.example.com", "10.0.0.0/8"),
        max_bytes=2 << 20,
        max_pixels=1_000_000,
        max_count=3,
        max_tokens=1024,
        held_bytes=64 << 20,
        workers=2,
        fetch_timeout=timedelta(seconds=3),
        decode_timeout=timedelta(seconds=20),
    )
    shown = written(tmp_path, config_text.to_toml(config))
    assert load(shown, tmp_path).images == config.images


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('allow = "public"', "images.allow: must be a list"),
        ("max_count = -1", "images.max_count: must be a whole number from 0 to 1000"),
        ("max_pixels = 1", "images.max_pixels: must be a whole number from 4096"),
        ('max_bytes = "400MiB"', "images.held_bytes: must be at least four times max_bytes"),
        ('decode_timeout = "1h"', "images.decode_timeout: must be from 1s to 5m"),
        ("max_size = 5", "images.max_size: unknown key"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(written(tmp_path, f"[images]\n{text}\n"), tmp_path)
    assert complaint in str(raised.value)
