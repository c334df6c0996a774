"""`[batches]` and `[webhooks]`: defaults, what a file may say, what it is told where it is wrong."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from aiexport_edge.proto.config import ConfigError, load
from aiexport_edge.proto.config_batches import BatchesConfig
from aiexport_edge.proto.config_text import to_toml
from aiexport_edge.proto.config_webhooks import WebhooksConfig


def test_nothing_is_called_by_default(tmp_path: Path) -> None:
    config = load(None, tmp_path)
    assert config.webhooks == WebhooksConfig((), timedelta(seconds=15), None)
    assert config.batches == BatchesConfig(256 << 20, 256)


def test_what_is_written_holds_and_is_shown(tmp_path: Path) -> None:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(
        '[batches]\nmax_body_bytes = "1MiB"\nmax_in_flight = 3\n'
        '[webhooks]\nallow = ["Hooks.Example.com.", "10.0.0.0/8", "::1", "public", "public"]\n'
        'timeout = "5s"\nca = "own.pem"\n'
    )
    config = load(file, tmp_path / "state")
    assert config.batches == BatchesConfig(1 << 20, 3)
    allow = ("hooks.example.com", "10.0.0.0/8", "::1/128", "public")
    assert config.webhooks == WebhooksConfig(allow, timedelta(seconds=5), tmp_path / "own.pem")
    shown = tmp_path / "shown.toml"
    shown.write_text(to_toml(config))
    again = load(shown, tmp_path / "state")
    assert (again.batches, again.webhooks) == (config.batches, config.webhooks)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[batches]\nmax_in_flight = 0\n", "batches.max_in_flight: must be a whole number from 1 to 4096"),
        ('[webhooks]\nallow = "public"\n', "webhooks.allow: must be a list such as"),
        ("[webhooks]\nallow = [5]\n", "webhooks.allow: holds 5, which is no text"),
        ('[webhooks]\nallow = ["10.0.0.1/8"]\n', "which is no address block: 10.0.0.1/8 has host bits set"),
        ('[webhooks]\nallow = ["1.2.3"]\n', "which is no address block"),
        ('[webhooks]\nallow = ["https://x/"]\n', "which is no address block"),
        ('[webhooks]\nallow = ["*.example.com"]\n', 'which is no host name, address, CIDR block or "public"'),
        ('[webhooks]\ntimeout = "5m"\n', "webhooks.timeout: must be at most 2m"),
        ("[webhooks]\nalow = []\n", 'webhooks.alow: unknown key; did you mean "allow"?'),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as wrong:
        load(file, tmp_path / "state")
    assert problem in str(wrong.value)
