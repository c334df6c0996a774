"""`[admin]`: where the operator's listener may be, and what it needs there."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiexport_edge.proto import config_text
from aiexport_edge.proto.config import Config, ConfigError, load

TLS = '[tls]\ncert = "cert.pem"\nkey = "key.pem"\n'


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    return load(file, tmp_path / "state")


@pytest.mark.parametrize("listen", ["127.0.0.1:9000", "[::1]:9000", "localhost:9000"])
def test_loopback_needs_nothing(tmp_path: Path, listen: str) -> None:
    assert read(tmp_path, f'[admin]\nlisten = "{listen}"\n').admin_listen == listen


@pytest.mark.parametrize("listen", ["0.0.0.0:9000", "[::]:9000", "edge.example:9000", "192.0.2.1:9000"])
def test_beyond_loopback_it_is_encrypted_or_said_to_be(tmp_path: Path, listen: str) -> None:
    section = f'[admin]\nlisten = "{listen}"\n'
    with pytest.raises(ConfigError, match=r"admin\.listen: .* the login would travel unencrypted; set \[tls\] cert"):
        read(tmp_path, section)
    with pytest.raises(ConfigError, match="unencrypted"):
        read(tmp_path, section + "plain_http = false\n")
    assert read(tmp_path, section + TLS).admin_listen == listen
    plain = read(tmp_path, section + "plain_http = true\n")
    assert plain.admin.plain_http
    assert read(tmp_path, config_text.to_toml(plain)).admin == plain.admin


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ('listen = "8401"\n', "admin.listen: must be HOST:PORT"),
        ('listen = "127.0.0.1:0"\n', "admin.listen: must be HOST:PORT"),
        ("plain_http = 1\n", "admin.plain_http: must be true or false"),
        ("plain_htp = true\n", 'admin.plain_htp: unknown key; did you mean "plain_http"?'),
    ],
)
def test_what_is_wrong(tmp_path: Path, section: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "[admin]\n" + section)
    assert expected in str(error.value)
