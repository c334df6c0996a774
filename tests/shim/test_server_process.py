"""The worker as a process: start, memory, metrics over several workers, drain, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from sqlalchemy import text as sql
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, until
from support.shim_workers import Workers

Engines = Callable[..., ScriptedEngine]


@pytest.fixture
def workers(tmp_path: Path, make_engine: Engines) -> Iterator[Workers]:
    made = Workers(tmp_path / "state", make_engine())
    yield made
    made.close()


def message(text: str) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": text}]}


def test_start_serve_drain(workers: Workers) -> None:
    """Small after a body of 31 MiB too; SIGTERM lets a stream end, and the process then ends with 0."""
    process = workers.start()
    workers.wait_ready()
    with workers.client() as client:
        assert client.post("/v2/messages", json=message("x" * (31 << 20))).status_code == 200
        assert client.post("/v2/messages", content=b"x" * (33 << 20)).status_code == 413
        assert client.post("/v2/messages", content=b"[" + b"{}," * (10 << 20) + b"1]").status_code == 400
        until(lambda: psutil.Process(process.pid).memory_info().rss <= 120 << 20, "memory goes back", 60)
        workers.engine.pause()
        workers.engine.permit(1)
        with client.stream("POST", "/v2/messages/stream", json=message("COUNT 9")) as reply:
            pieces = reply.iter_text()
            seen = next(pieces)
            while "content_block_delta" not in seen:
                seen += next(pieces)
            process.send_signal(signal.SIGTERM)
            workers.engine.free_run()
            workers.engine.permit(1)
            seen += "".join(pieces)
    assert "message_stop" in seen
    assert process.wait(60) == 0
    assert workers.statuses() == ["completed"] * 2
    lines = [json.loads(line) for line in process.communicate()[1].splitlines()]
    access = [line for line in lines if line["logger"] == "aiexport_edge.access" and "/v2/messages" in line["message"]]
    assert [line["message"].split()[-1] for line in access] == ["200", "413", "400", "200"]
    assert access[-1]["request_id"].startswith("req_")
    assert {"workspace": "acme", "outcome": "completed", "output": 9, "input": 6}.items() <= access[-1].items()
    assert workers.key not in json.dumps(lines)


def test_what_does_not_end_within_the_drain_is_cut(workers: Workers) -> None:
    process = workers.start()
    workers.wait_ready()
    workers.engine.pause()
    workers.engine.permit(1)
    with workers.client() as client, client.stream("POST", "/v2/messages/stream", json=message("COUNT 9")) as reply:
        pieces = reply.iter_text()
        seen = next(pieces)
        while "content_block_delta" not in seen:
            seen += next(pieces)
        process.send_signal(signal.SIGTERM)
        seen += "".join(pieces)
    assert seen.endswith("\n\n")
    assert "event: error" in seen
    assert process.wait(60) == 0
    assert workers.statuses() == ["failed"]


def test_metrics_are_of_all_workers_and_on_the_admin_listener_alone(workers: Workers) -> None:
    first = workers.start()
    workers.wait_ready()
    with workers.client() as client:
        assert client.post("/v2/messages", json=message("COUNT 5")).status_code == 200
        assert client.get("/metrics").status_code == 404
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 0
    second, third = workers.start(), workers.start()
    workers.wait_ready()
    (directory,) = (workers.state / "metrics").iterdir()
    until(lambda: any(str(third.pid) in file.name for file in directory.iterdir()), "the third is up")
    with workers.client() as client:
        for _ in range(4):
            assert client.post("/v2/messages", json=message("COUNT 5")).status_code == 200

    def lines() -> list[str]:
        return httpx.get(f"{workers.admin_url}/metrics").text.splitlines()

    # what a worker has counted outlives it; a request is counted when its reply has been sent
    posts = 'aiexport_http_requests_total{method="POST",route="/v2/messages",status="200"} 5.0'
    until(lambda: posts in lines() and "aiexport_messages_in_flight 0.0" in lines(), "all is counted")
    assert f'aiexport_tokens_total{{kind="output",model="{HAIKU}"}} 25.0' in lines()
    assert second.poll() is None
    for path in ("/v2/models", "/v2/messages", "/nothing"):
        assert httpx.get(workers.admin_url + path).json()["error"]["type"] == "not_found_error"


def test_a_killed_worker_loses_no_accounting(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row is there with what was checkpointed, and another process settles it."""
    process = workers.start()
    workers.wait_ready()
    workers.engine.pause()
    workers.engine.permit(3)

    def row() -> tuple[Any, ...]:
        with workers.store.database.connect() as connection:
            return tuple(connection.execute(sql("SELECT status, input_tokens, output_tokens FROM usage")).one())

    with workers.client() as client:
        request = client.build_request("POST", "/v2/messages/stream", json=message("COUNT 9"))
        reply = client.send(request, stream=True)
        assert reply.status_code == 200
        until(lambda: row() == ("running", 6, 3), "three tokens are checkpointed")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(httpx.RemoteProtocolError):
            reply.read()
        reply.close()
    with workers.store.database.begin() as connection:  # rather than wait for the silence to pass
        connection.execute(sql("UPDATE processes SET heartbeat_at = heartbeat_at - 60000"))
    workers.start()
    workers.wait_ready()
    until(lambda: row() == ("aborted", 6, 3), "the row is settled")


@pytest.mark.parametrize("wrong", ["[shim]\nprot = 5\n", '[store]\nurl = "nodb://x"\n'])
def test_it_says_what_is_wrong(workers: Workers, wrong: str) -> None:
    workers.config.write_text(wrong)
    process = workers.start()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "port" in err or "nodb" in err


def test_imports_no_torch_and_nothing_of_the_engine() -> None:
    heavy = ("torch", "numpy", "aiexport_edge.engine", "aiexport_edge.kernels")
    script = f"""
import sys, aiexport_edge.shim.app, aiexport_edge.shim.server
print([name for name in sys.modules if name.startswith({heavy})])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
