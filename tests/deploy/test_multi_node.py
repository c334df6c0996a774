"""The example of several machines, as far as one machine can try it."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.certificates import write_certificate
from support.edge import free_port, wait_until
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer

from aiexport_edge.engine.server.listener import ListenerConfig, open_listener
from aiexport_edge.proto import config as configuration
from aiexport_edge.proto.engine_pb2_grpc import EngineServicer
from aiexport_edge.shim.engines.access import Endpoint, EngineAccess
from aiexport_edge.shim.engines.handshake import why_refused

EXAMPLE = Path(__file__).resolve().parents[2] / "deploy" / "multi-node"
UNITS = sorted(file.name for file in EXAMPLE.glob("*.service"))


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """As /etc/aiexport-edge of a machine, with the certificates made."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificate can be made")
    shutil.copy(EXAMPLE / "aiexport-edge.toml", tmp_path)
    make_certificates(tmp_path)
    (tmp_path / "redis-password").write_text("secret\n")
    return tmp_path


def make_certificates(directory: Path) -> None:
    command = ["sh", str(EXAMPLE / "certificates.sh"), str(directory / "tls"), "engines.internal"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_file_says_the_same_to_all(installed: Path) -> None:
    config = configuration.load(installed / "aiexport-edge.toml", installed / "state")
    (model,) = config.models
    assert model.vllm is not None
    parallel = model.vllm
    assert (parallel.tensor_parallel, parallel.pipeline_parallel, parallel.distributed) == (8, 2, "ray")
    assert config.engine_addresses == ("dns:///engines.internal:50051",)
    for file in (config.engine.tls_cert, config.engine.tls_key, config.engine.client_ca, config.engine.token_file):
        assert file is not None
        assert file.is_file()
    shim = config.shim
    EngineAccess(shim.engine_ca, shim.engine_cert, shim.engine_key, shim.engine_token_file).check()


def test_config_check_takes_it(installed: Path) -> None:
    """With a model, and an interpreter for vLLM, that are there."""
    file = installed / "aiexport-edge.toml"
    source = configuration.source_directory("demo")
    text = file.read_text()
    for old, new in (("/srv/models/opus", source), ("/opt/vllm/bin/python", sys.executable), ("32768", 4096)):
        assert text.count(str(old)) == 1
        text = text.replace(str(old), str(new))
    file.write_text(text)
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "config", "check", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=installed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_certificates_fit_what_the_file_says(installed: Path) -> None:
    """Engine and front as configured, over a real connection; a client without the front's certificate is not let in.
    Then they are renewed, while the engine serves."""
    config = configuration.load(installed / "aiexport-edge.toml", installed / "state")
    engine, shim = config.engine, config.shim
    access = EngineAccess(shim.engine_ca, shim.engine_cert, shim.engine_key, shim.engine_token_file)
    listener = ListenerConfig("0.0.0.0:0", engine.tls_cert, engine.tls_key, engine.token_file, engine.client_ca)

    async def status(endpoint: Endpoint) -> grpc.StatusCode:
        async with access.channel(endpoint) as channel:
            request = health_pb2.HealthCheckRequest()
            call = health_pb2_grpc.HealthStub(channel).Check(request, metadata=access.metadata(), timeout=60)
            code: grpc.StatusCode = await call.code()
            return code

    async def test() -> None:
        opened = await open_listener(listener, EngineServicer())
        endpoint = Endpoint(f"127.0.0.1:{opened.port}", "engines.internal")
        try:
            assert await status(endpoint) is grpc.StatusCode.OK
            stranger = EngineAccess(shim.engine_ca, token_file=shim.engine_token_file)
            assert "engine_cert" in (await asyncio.to_thread(why_refused, endpoint, stranger) or "")
            before = engine.tls_cert.read_bytes() if engine.tls_cert else b""
            await asyncio.to_thread(make_certificates, installed)
            assert engine.tls_cert is not None
            assert engine.tls_cert.read_bytes() != before
            assert await status(endpoint) is grpc.StatusCode.OK
        finally:
            await opened.close(0)

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("unit", UNITS)
def test_units(unit: str, tmp_path: Path) -> None:
    """As on a machine where the programs are where the unit says, and the user exists."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed (Debian: apt install systemd)")
    for name in UNITS:
        text = (EXAMPLE / name).read_text()
        text, programs = re.subn(r"/opt/(aiexport-edge/\.venv|vllm)/bin/(aiexport-edge|ray)", "/bin/true", text)
        assert programs == 1
        (tmp_path / name).write_text(text.replace("User=aiexport-edge", "User=nobody"))
    done = subprocess.run([analyze, "verify", "--man=no", tmp_path / unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Unknown" not in done.stderr


def test_streams_go_through_nginx_as_they_come(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The example's nginx in front of two shims: an event arrives before the next one is made, and a front that goes
    away costs no request."""
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed (Debian: apt install nginx-light)")
    engine = ScriptedEngine(f"unix:{tmp_path / 'engine.sock'}")
    engine.start()
    request.addfinalizer(engine.close)
    fronts = [ShimServer(tmp_path / "state", (engine.address,)) for _ in range(2)]
    for front in fronts:
        front.start()
        request.addfinalizer(front.stop)
        front.wait_ready()
    port = free_port()
    ca, _ = write_certificate(tmp_path, "127.0.0.1")
    text = (EXAMPLE / "nginx.conf").read_text()
    changes = {
        "listen 443": f"listen 127.0.0.1:{port}",
        "/etc/aiexport-edge/tls/fullchain.pem": str(tmp_path / "cert.pem"),
        "/etc/aiexport-edge/tls/privkey.pem": str(tmp_path / "key.pem"),
        "/run/nginx.pid": str(tmp_path / "nginx.pid"),
        "worker_processes auto": "worker_processes 1",
    }
    changes |= {
        f"front-{number + 1}.internal:8400": ":".join(map(str, front.address())) for number, front in enumerate(fronts)
    }
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    temporary = "".join(
        f"{kind}_temp_path {tmp_path / kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(text.replace("http {", f"http {{ {temporary}", 1))
    command = [nginx, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "error.log")]
    checked = subprocess.run([*command, "-t"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    server = subprocess.Popen([*command, "-g", "daemon off;"], cwd=tmp_path)
    request.addfinalizer(lambda: server.wait(30))
    request.addfinalizer(server.terminate)
    with httpx.Client(
        base_url=f"https://127.0.0.1:{port}", verify=ssl.create_default_context(cafile=ca), timeout=60
    ) as client:
        client.headers["X-API-Key"] = fronts[0].key.key

        def answers() -> bool:
            try:
                return client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, "nginx answers")
        engine.pause()
        body: dict[str, Any] = {"model": HAIKU, "messages": [{"role": "user", "content": "COUNT 3"}]}
        seen: list[str] = []
        with client.stream("POST", "/v2/messages/stream", json=body) as reply:
            assert reply.status_code == 200
            for line in reply.iter_lines():
                if line.startswith("event:"):
                    seen.append(line)
                    if line.endswith(("content_block_start", "content_block_delta")):
                        engine.permit(1)  # the next token is made only once this event has come through
        assert seen.count("event: content_block_delta") == 3
        assert seen[-1] == "event: message_stop"
        engine.free_run()
        fronts[1].stop()
        assert [client.post("/v2/messages", json=body).status_code for _ in range(6)] == [200] * 6


def test_the_page_names_what_is_there() -> None:
    page = (EXAMPLE / "README.md").read_text()
    for name in re.findall(r"`([a-z-]+\.(?:service|sh|conf|toml))`", page):
        assert (EXAMPLE / name).is_file(), name
    assert set(UNITS) <= set(re.findall(r"`([a-z-]+\.service)`", page))
    assert tomllib.loads((EXAMPLE / "aiexport-edge.toml").read_text())["shim"]["routing"] == "prefix"
