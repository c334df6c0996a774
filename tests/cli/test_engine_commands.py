"""`status`, and what `doctor` says of engines on other machines: over real sockets, with real certificates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from support.certificates import Authority
from support.edge import free_port
from support.scripted_engine import ScriptedEngine
from support.shim_server import ShimServer, until

from aiexport_edge.proto import config as configuration
from aiexport_edge.shim.cli import engine_checks
from aiexport_edge.shim.cli.check import OK, PROBLEM, WARNING
from aiexport_edge.shim.cli.main import main


@pytest.fixture
def make_engine() -> Iterator[Callable[..., ScriptedEngine]]:
    made: list[ScriptedEngine] = []

    def make(**kwargs: Any) -> ScriptedEngine:
        engine = ScriptedEngine(f"127.0.0.1:{free_port()}", **kwargs)
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()


def write_config(directory: Path, text: str) -> configuration.Config:
    file = directory / "aiexport-edge.toml"
    file.write_text(text)
    return configuration.load(file, directory / "state")


def status(config: configuration.Config, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["status", "--json", "--config", str(config.path), "--state", str(config.state)])
    return code, json.loads(capsys.readouterr().out)


def test_status(make_engine: Callable[..., ScriptedEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = make_engine()
    away = f"127.0.0.1:{free_port()}"
    shim = ShimServer(tmp_path / "shim", (engine.address,))
    shim.start()
    try:
        shim.wait_ready()
        port = shim.address()[1]
        config = write_config(tmp_path, f'[shim]\nport = {port}\nengines = ["{engine.address}"]\n')
        engine.load = (3, 2)
        code, document = status(config, capsys)
        assert code == 0
        assert document["service"]["status"] == "operational"
        assert document["service"]["engines"] == {"total": 1, "serving": 1}
        (seen,) = document["engines"]
        assert (seen["address"], seen["state"], seen["running"], seen["waiting"]) == (engine.address, "serving", 3, 2)
        assert seen["models"] == [{"name": "demo", "state": "ready", "revision": "r1", "message": ""}]
        assert main(["status", "--config", str(config.path), "--state", str(config.state)]) == 0
        assert f"engine    {engine.address}: serving" in capsys.readouterr().out

        engine.set_serving(False)
        until(lambda: not shim.engines.sessions[0].vitals.serving, "it is noticed")
        code, document = status(config, capsys)
        assert code == 1
        assert document["engines"][0]["state"] == "unhealthy"
        engine.set_serving(True)
        config = write_config(tmp_path, f'[shim]\nport = {port}\nengines = ["{engine.address}", "{away}"]\n')
        code, document = status(config, capsys)
        assert code == 1
        assert document["engines"][1]["state"] == "away"
        assert "start the engine" in document["engines"][1]["reason"]
    finally:
        shim.stop()
    code, document = status(config, capsys)
    assert code == 1
    assert document["service"]["status"] == "unreachable"


def test_names_are_each_of_their_addresses(
    make_engine: Callable[..., ScriptedEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = make_engine()
    port = engine.address.rpartition(":")[2]
    names = f'["dns:///localhost:{port}", "dns:///no-such-name.invalid:1"]'
    config = write_config(tmp_path, f"[shim]\nport = {free_port()}\nengines = {names}\n")
    _, document = status(config, capsys)
    states = {seen["address"]: seen["state"] for seen in document["engines"]}
    assert states[engine.address] == "serving"
    assert states["dns:///no-such-name.invalid:1"] == "away"


# ---------------------------------------------------------------------------------------------------- doctor


def test_nothing_to_say_without_engines_elsewhere(tmp_path: Path) -> None:
    config = configuration.load(None, tmp_path)
    assert not [*engine_checks.certificates(config), *engine_checks.engines(config)]


@pytest.mark.parametrize(("days", "found"), [(90, OK), (3, WARNING), (-2, PROBLEM)])
def test_how_long_certificates_are_good(tmp_path: Path, days: int, found: str) -> None:
    authority = Authority(tmp_path)
    authority.issue("engine", ["127.0.0.1"], days=days)
    authority.issue("shim", days=days)
    config = write_config(
        tmp_path,
        '[engine]\ntls_cert = "engine-cert.pem"\ntls_key = "engine-key.pem"\nclient_ca = "authority.pem"\n'
        '[shim]\nengine_ca = "authority.pem"\nengine_cert = "shim-cert.pem"\nengine_key = "shim-key.pem"\n',
    )
    checks = {check.name: check for check in engine_checks.certificates(config)}
    assert checks["engine certificate"].status == checks["certificate for engines"].status == found
    assert checks["engines' authority"].status == checks["engine clients' authority"].status == OK
    assert bool(checks["engine certificate"].remedy) is (found != OK)


def test_a_file_that_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    config = write_config(tmp_path, '[shim]\nengine_ca = "ca.pem"\nengines = ["10.0.0.1:50051"]\n')
    (check,) = engine_checks.certificates(config)
    assert (check.status, "no certificate" in check.detail) == (PROBLEM, True)
    (check,) = engine_checks.engines(config)
    assert "engine_ca" in check.detail


def test_engines_as_they_answer(make_engine: Callable[..., ScriptedEngine], tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("engine", ["127.0.0.1"])
    pair = [(key.read_bytes(), cert.read_bytes())]
    credentials = grpc.ssl_server_credentials(pair, authority.file.read_bytes(), True)
    one, two = make_engine(credentials=credentials), make_engine(credentials=credentials)
    two.revision = "r2"
    engines = f'engines = ["{one.address}", "{two.address}"]\nengine_ca = "authority.pem"\n'
    authority.issue("shim")
    config = write_config(tmp_path, f'[shim]\n{engines}engine_cert = "shim-cert.pem"\nengine_key = "shim-key.pem"\n')
    first, second, weights = engine_checks.engines(config)
    assert first.status == second.status == OK
    assert weights.status == WARNING
    assert f"r1 at {one.address}; r2 at {two.address}" in weights.detail
    config = write_config(tmp_path, f"[shim]\n{engines}")
    for check in engine_checks.engines(config):
        assert check.status == PROBLEM
        assert "engine_cert and engine_key" in check.detail
