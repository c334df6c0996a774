"""`[adapters]`: defaults, what a file may say, what it is told where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiexport_edge.proto import config_text
from aiexport_edge.proto.config import ConfigError, load
from aiexport_edge.proto.config_adapters import AdaptersConfig


def written(directory: Path, text: str) -> Path:
    path = directory / "aiexport-edge.toml"
    path.write_text(text)
    return path


def test_by_default_a_card_keeps_nothing_for_adapters(tmp_path: Path) -> None:
    config = load(written(tmp_path, ""), tmp_path)
    assert config.adapters == AdaptersConfig()
    assert config.adapters.roots == ()
    assert config.adapter_roots == (tmp_path / "adapters",)
    assert config.adapters.card_slots == 0
    shown = written(tmp_path, config_text.to_toml(config))
    assert 'slots = "auto"' in shown.read_text()
    assert load(shown, tmp_path).adapters == config.adapters
    named = load(written(tmp_path, '[adapters]\nroots = ["/srv"]\n'), tmp_path)
    assert (named.adapters.card_slots, named.adapters.card_rank) == (8, 64)
    assert load(written(tmp_path, "[adapters]\nslots = 3\n"), tmp_path).adapters.card_slots == 3
    assert config.plans["enterprise"].families == ("opus", "sonnet", "haiku", "custom")
    assert "custom" not in config.plans["pro"].families


def test_every_key(tmp_path: Path) -> None:
    text = (
        '[adapters]\nroots = ["/srv/adapters", "mine"]\nslots = 32\nmax_rank = 128\nhost_bytes = "4GiB"\n'
        'input_surcharge = 0.5\noutput_surcharge = 2\n[plans.pro]\nfamilies = ["haiku", "custom"]\n'
    )
    config = load(written(tmp_path, text), tmp_path)
    assert config.adapters == AdaptersConfig(
        roots=(Path("/srv/adapters"), tmp_path / "mine"),
        slots=32,
        max_rank=128,
        host_bytes=4 << 30,
        input_surcharge=0.5,
        output_surcharge=2.0,
    )
    assert config.plans["pro"].families == ("haiku", "custom")
    shown = written(tmp_path, config_text.to_toml(config))
    assert load(shown, tmp_path).adapters == config.adapters


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('roots = "/srv"', 'adapters.roots: must be a list of directories such as ["/srv/adapters"]'),
        ("roots = [7]", "adapters.roots: must be a text"),
        ("slots = 0", 'adapters.slots: must be "auto" or a whole number from 1 to 1024'),
        ("max_rank = 512", 'adapters.max_rank: must be "auto" or a whole number from 1 to 256'),
        ("input_surcharge = -1", "adapters.input_surcharge: must be a price"),
        ("slot = 3", 'adapters.slot: unknown key; did you mean "slots"?'),
    ],
)
def test_what_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, f"[adapters]\n{text}\n"), tmp_path)
    assert complaint in str(caught.value)
