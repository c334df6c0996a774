"""What `doctor` says of the REST listener's certificate and of traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.certificates import write_certificate

from aiexport_edge.proto import config as configuration
from aiexport_edge.proto.config import Config
from aiexport_edge.proto.config_tls import TlsConfig
from aiexport_edge.shim.cli import listener_checks
from aiexport_edge.shim.cli.check import OK, PROBLEM, WARNING


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return configuration.load(None, tmp_path / "state")


def test_without_tls(config: Config) -> None:
    """Nothing on loopback; beyond it, what that means."""
    assert list(listener_checks.certificate(config)) == []
    [check] = listener_checks.certificate(replace(config, shim=replace(config.shim, host="0.0.0.0")))
    assert (check.status, check.name) == (WARNING, "tls")
    assert "[tls] cert and key" in check.remedy


@pytest.mark.parametrize(("days", "status"), [(90, OK), (3, WARNING), (-2, PROBLEM)])
def test_how_long_the_certificate_is_good(config: Config, tmp_path: Path, days: int, status: str) -> None:
    cert, key = write_certificate(tmp_path, "127.0.0.1", days=days)
    [check] = listener_checks.certificate(replace(config, tls=TlsConfig(cert, key)))
    assert check.status == status
    assert bool(check.remedy) is (status != OK)


def test_a_certificate_that_can_t_be_used(config: Config, tmp_path: Path) -> None:
    cert, key = write_certificate(tmp_path, "127.0.0.1")
    key.write_text("nonsense")
    [check] = listener_checks.certificate(replace(config, tls=TlsConfig(cert, key)))
    assert check.status == PROBLEM
    [check] = listener_checks.certificate(replace(config, tls=TlsConfig(cert, tmp_path / "none.pem")))
    assert check.status == PROBLEM


def test_traces(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(listener_checks.traces(config)) == []
    traced = replace(config, telemetry=replace(config.telemetry, otlp_endpoint="http://127.0.0.1:4317"))
    [check] = listener_checks.traces(traced)
    assert check.status == OK
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    [check] = listener_checks.traces(traced)
    assert check.status == PROBLEM
    assert "[otel]" in check.remedy
