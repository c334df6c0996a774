"""The configuration of the listener and of telemetry: `[tls]`, `[telemetry]`, connections and origins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiexport_edge.proto import config_text
from aiexport_edge.proto.config import Config, ConfigError, load
from aiexport_edge.proto.config_tls import TlsConfig


def read(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "aiexport-edge.toml"
    file.write_text(text)
    return load(file, tmp_path / "state")


def test_nothing_is_on_by_default(tmp_path: Path) -> None:
    config = read(tmp_path, "")
    assert config.tls == TlsConfig(None, None)
    assert config.shim.cors_origins == ()
    assert not config.telemetry.log_prompts
    assert config.telemetry.otlp_endpoint is None


def test_they_are_read_and_read_back(tmp_path: Path) -> None:
    text = (
        '[tls]\ncert = "tls/cert.pem"\nkey = "tls/key.pem"\n'
        '[shim]\nmax_connections = 10\ncors_origins = ["https://app.example.com", "http://localhost:3000"]\n'
        '[telemetry]\nlog_prompts = true\notlp_endpoint = "http://127.0.0.1:4317"\n'
    )
    config = read(tmp_path, text)
    assert config.tls == TlsConfig(tmp_path / "tls/cert.pem", tmp_path / "tls/key.pem")
    assert config.shim.max_connections == 10
    again = read(tmp_path, config_text.to_toml(config))
    assert (again.tls, again.telemetry) == (config.tls, config.telemetry)
    assert (again.shim.max_connections, again.shim.cors_origins) == (10, config.shim.cors_origins)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[tls]\ncert = "x.pem"\n', "tls.key: is missing; cert and key go together"),
        ('[tls]\nkey = "x.pem"\n', "tls.cert: is missing; cert and key go together"),
        ('[tls]\ncrt = "x.pem"\n', 'tls.crt: unknown key; did you mean "cert"?'),
        ('[shim]\ncors_origins = "*"\n', "shim.cors_origins: must be a list of origins"),
        ('[shim]\ncors_origins = ["*", "https://x"]\n', "shim.cors_origins: '*' is no origin"),
        ('[shim]\ncors_origins = ["https://x/"]\n', "shim.cors_origins: 'https://x/' is no origin"),
        ("[shim]\nmax_connections = 0\n", "shim.max_connections: must be a whole number"),
        ('[telemetry]\nlog_prompts = "yes"\n', "telemetry.log_prompts: must be true or false"),
        ('[telemetry]\notlp_endpoint = "localhost:4317"\n', "telemetry.otlp_endpoint: must be a URL such as"),
        ('[telemetry]\notlp_endpoint = "http://u:p@h"\n', "telemetry.otlp_endpoint: must be a URL such as"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert str(error.value).partition(": ")[2].startswith(expected)


def test_any_origin(tmp_path: Path) -> None:
    assert read(tmp_path, '[shim]\ncors_origins = ["*"]\n').shim.cors_origins == ("*",)


def test_what_the_documents_show_is_right(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "deploy" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```toml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    [config] = [read(tmp_path, block) for block in blocks if "otlp_endpoint" in block]
    assert config.shim.max_connections == 4096
    assert config.telemetry.otlp_endpoint == "http://127.0.0.1:4317"
