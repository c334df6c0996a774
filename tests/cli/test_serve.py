"""`serve` as a newcomer meets it: real processes, the printed key, the printed curl line, and the ways it ends."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from support.edge import KEY, free_port, wait_until

from aiexport_edge.shim.cli import welcome
from aiexport_edge.shim.store import open_store

PROGRAM = (sys.executable, "-m", "aiexport_edge.shim.cli.main")


@dataclass
class Serve:
    """A running `serve`, ready, and what it printed on stdout."""

    process: subprocess.Popen[str]
    port: int
    greeting: str

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def last_line(self) -> str:
        """The one to paste."""
        return self.greeting.splitlines()[-1]

    def children(self, module: str) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # one that has just been killed
                if module in child.cmdline():
                    found.append(child)
        return found

    def get(self, path: str, key: str = "") -> int:
        return httpx.get(self.url + path, headers={"X-API-Key": key}, timeout=60).status_code


@contextmanager
def serving(state: Path, *args: str, ends: int = 0, runner: tuple[str, ...] = ()) -> Iterator[Serve]:
    """Starts `serve`, waits until it has printed a line to paste; in the end SIGTERM must bring the status `ends`."""
    port = free_port()
    ports = ("--port", str(port), "--admin-port", str(free_port()))
    log = state.parent / "stderr.txt"
    with (
        log.open("a") as stderr,
        subprocess.Popen(
            [*runner, *PROGRAM, "serve", "--state", str(state), *ports, *args],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=state.parent,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            greeting = ""
            for line in process.stdout:
                greeting += line
                if line.startswith("curl ") or " keys create " in line:
                    break
            else:
                pytest.fail(f"serve ended before it was ready: {log.read_text()}")
            yield Serve(process, port, greeting)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == ends, log.read_text()
        finally:
            process.kill()


def paste(line: str) -> str:
    """What a line prints when a person pastes it into a shell."""
    if line.startswith("curl ") and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_first_start_then_a_later_one(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(state) as first:
        assert f"{first.url}/v2" in first.greeting
        found = KEY.search(first.greeting)
        assert found is not None
        reply = paste(first.last_line)
        assert reply.startswith("event: message_start\n")
        assert '"type":"text_delta"' in reply
        assert "event: message_stop\n" in reply
        assert not (state / welcome.MARKER).exists()
        assert not (state / welcome.KEY_FILE).exists()

        # wherever its listeners are: the ports were not configured
        asked = subprocess.run(
            [*PROGRAM, "status", "--json", "--state", str(state)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert (asked.returncode, json.loads(asked.stdout)["service"]["status"]) == (0, "operational"), asked.stdout
        second = subprocess.run(
            [*PROGRAM, "serve", "--state", str(state)], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert (second.returncode, second.stdout) == (1, "")
        assert second.stderr == (
            f"aiexport-edge: another serve (pid {first.process.pid}) runs on {state}; "
            "stop it, or give this one a --state of its own\n"
        )

    with serving(state) as later:
        assert f"{later.url}/v2" in later.greeting
        assert KEY.search(later.greeting) is None
        assert later.get("/v2/models", found[0]) == 200
        made = KEY.search(paste(later.last_line))
        assert made is not None
        assert later.get("/v2/models", made[0]) == 200


def test_a_first_start_that_died_before_it_printed_the_key(tmp_path: Path) -> None:
    """The key that nobody has seen is revoked, and another printed."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    store = open_store(f"sqlite:///{state / 'store.db'}")
    store.create_workspace(welcome.WORKSPACE, "enterprise")
    unseen = store.create_key(welcome.WORKSPACE)
    own = store.create_key(welcome.WORKSPACE)
    store.close()
    (state / welcome.MARKER).write_text(unseen.key_id)
    with serving(state) as again:
        found = KEY.search(again.greeting)
        assert found is not None
        assert again.get("/v2/models", found[0]) == 200
        assert again.get("/v2/models", own.key) == 200
        assert again.get("/v2/models", unseen.key) == 401


def test_beyond_loopback_the_key_goes_to_a_file(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving(state, "--host", "0.0.0.0") as edge:
        assert KEY.search(edge.greeting) is None
        file = state / welcome.KEY_FILE
        assert str(file) in edge.greeting.splitlines()
        assert file.stat().st_mode & 0o777 == 0o600
        assert KEY.fullmatch(file.read_text().strip())
        assert "event: message_stop" in paste(edge.last_line)


def test_with_a_configuration_nothing_is_made(tmp_path: Path) -> None:
    """An operator who has written a configuration makes workspaces on purpose."""
    (tmp_path / "aiexport-edge.toml").write_text('[telemetry]\nlog_format = "json"\n')
    with serving(tmp_path / "state") as edge:
        assert KEY.search(edge.greeting) is None
        assert "There is no workspace yet." in edge.greeting
        lines = edge.greeting.splitlines()
        paste(lines[-2])
        found = KEY.search(paste(lines[-1]))
        assert found is not None
        assert edge.get("/v2/models", found[0]) == 200


def test_parts_that_are_killed_come_back(tmp_path: Path) -> None:
    nohup = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    with serving(tmp_path / "state", "--host", "127.0.0.1", runner=nohup) as edge:
        edge.process.send_signal(signal.SIGHUP)  # its terminal is closed: nothing ends
        found = KEY.search(edge.greeting)
        assert found is not None
        [shim] = edge.children("aiexport_edge.shim.server")
        shim.kill()
        shim.wait(60)
        # the listening socket is the supervisor's: this connection waits for the next worker
        assert edge.get("/v2/models", found[0]) == 200
        [another] = edge.children("aiexport_edge.shim.server")
        assert another.pid != shim.pid

        [engine] = edge.children("aiexport_edge.engine")
        engine.kill()
        wait_until(lambda: edge.get("/readyz") == 503, "readiness drops", 60)
        wait_until(lambda: edge.get("/readyz") == 200, "readiness returns")
        assert "event: message_stop" in paste(edge.last_line)


def test_sigterm_lets_open_streams_finish(tmp_path: Path) -> None:
    """Twice in a row, as `timeout` and process managers send it to leader and group: it is one wish."""
    body = {
        "model": "apex-haiku-4-20250401",
        "max_tokens": 300,
        "messages": [{"role": "user", "content": "Tell me a long story about a bear."}],
    }
    with serving(tmp_path / "state") as edge:
        found = KEY.search(edge.greeting)
        assert found is not None
        headers = {"X-API-Key": found[0]}
        events = []
        with httpx.stream("POST", f"{edge.url}/v2/messages/stream", json=body, headers=headers, timeout=120) as reply:
            for line in reply.iter_lines():
                if line.startswith("event: "):
                    events.append(line.removeprefix("event: "))
                    if events == ["message_start", "content_block_start", "content_block_delta"]:
                        edge.process.send_signal(signal.SIGTERM)
                        edge.process.send_signal(signal.SIGTERM)
        assert events[-2:] == ["message_delta", "message_stop"]


def test_sigterm_while_it_starts(tmp_path: Path) -> None:
    with subprocess.Popen(
        [
            *PROGRAM,
            "serve",
            "--state",
            str(tmp_path / "state"),
            "--port",
            str(free_port()),
            "--admin-port",
            str(free_port()),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        assert process.stderr is not None
        assert "starting the engine (demo)" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, ""), err


def test_nothing_outlives_a_serve_that_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path / "state", ends=-signal.SIGKILL) as edge:
        family = psutil.Process(edge.process.pid).children(recursive=True)
        assert len(family) >= 3  # engine, its core, shim
        edge.process.kill()
        gone, left = psutil.wait_procs(family, timeout=60)
        assert left == []
        assert len(gone) == len(family)


def test_a_deep_state_directory(tmp_path: Path) -> None:
    """A path too long for a Unix socket is no reason to fail."""
    state = tmp_path / ("deep-" * 20) / "state"
    state.parent.mkdir()
    with serving(state) as edge:
        assert re.search("^curl ", edge.greeting, re.MULTILINE)
        assert "event: message_stop" in paste(edge.last_line)
        command = [*PROGRAM, "status", "--json", "--state", str(state)]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
        assert [engine["state"] for engine in json.loads(asked.stdout)["engines"]] == ["serving"]
    assert not (state / "engine.sock").is_symlink()
