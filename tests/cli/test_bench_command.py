"""`bench`: which server it measures, what it prints, and that its key ends with it."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.scripted_engine import ScriptedEngine
from support.shim_server import ShimServer

from aiexport_edge.shim.cli import machine
from aiexport_edge.shim.cli.main import main
from aiexport_edge.shim.cli.rest_client import events, parse_server

KEY = re.compile(r"axp_(live|test)_[A-Za-z0-9_-]{43}")


@pytest.fixture
def shim(tmp_path: Path) -> Iterator[ShimServer]:
    """A shim whose engine counts, on the state directory `state`."""
    engine = ScriptedEngine(f"unix:{tmp_path / 'engine.sock'}")
    engine.start()
    shim = ShimServer(tmp_path / "state", (engine.address,))
    shim.start()
    shim.wait_ready()
    yield shim
    shim.stop()
    engine.close()


@pytest.fixture
def locked(shim: ShimServer) -> Iterator[None]:
    """The state directory's lock, held as `serve` holds it."""
    descriptor = os.open(shim.config.state / "serve.lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    os.pwrite(descriptor, b"4711\n", 0)
    yield
    os.close(descriptor)


def bench(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["bench", "--time", "1s", "--streams", "2", *words]) == status
    captured = capsys.readouterr()
    assert KEY.search(captured.out + captured.err) is None
    return captured.out, captured.err


def check(document: dict[str, Any]) -> None:
    assert document["alone"]["replies"] >= 1
    assert document["alone"]["first_text_ms_p50"] > 0
    assert document["alone"]["tokens_per_second_p50"] > 0
    assert document["together"]["streams"] == 2
    assert document["together"]["replies"] >= 2
    assert document["together"]["tokens_per_second"] > 0
    assert document["machine"]["cores"] >= 1
    assert set(document["limits"]) == {"memory_copy_gb_per_second", "disk_free_gib", "fsync_ms_p50"}
    assert document["limits"]["memory_copy_gb_per_second"] > 0


def config_file(shim: ShimServer, port: int) -> str:
    file = shim.config.state.parent / "edge.toml"
    file.write_text(f"[shim]\nport = {port}\n")
    return str(file)


def test_the_running_server_is_measured_with_a_key_of_its_own(
    shim: ShimServer, locked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("--state", str(shim.config.state), "--config", config_file(shim, shim.address()[1]))
    document = json.loads(bench(capsys, *places, "--json")[0])
    check(document)
    assert (document["server"], document["note"]) == (shim.base_url, "serve, pid 4711")
    assert [workspace.name for workspace in shim.store.list_workspaces()] == ["acme"]  # its own is gone, and the key

    out, err = bench(capsys, *places)
    assert re.search(r"^2 streams +\d+(\.\d+)? tokens/s together$", out, re.MULTILINE)
    assert re.search(r"^memory copy +\d", out, re.MULTILINE)
    assert "one stream alone" in err


def test_a_server_elsewhere_with_a_given_key(
    shim: ShimServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = ("--state", str(tmp_path / "other"), "--url", shim.base_url)
    check(json.loads(bench(capsys, *places, "--key", shim.key.key, "--json")[0]))
    assert not (tmp_path / "other" / "store.db").exists()
    monkeypatch.setenv("AIEXPORT_KEY", shim.key.key)
    check(json.loads(bench(capsys, *places, "--json")[0]))
    monkeypatch.delenv("AIEXPORT_KEY")
    assert "pass a key of that server with --key" in bench(capsys, *places, status=1)[1]
    assert (
        "name a model that it serves with --model"
        in (bench(capsys, *places, "--key", shim.key.key, "--model", "nope", status=1)[1])
    )
    assert "holds blanks" in bench(capsys, *places, "--key", "a b", status=1)[1]


def test_servers_that_cannot_be_measured(
    shim: ShimServer, locked: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shim_port = shim.address()[1]
    config = config_file(shim, 1)  # nobody listens there
    _, err = bench(capsys, "--state", str(shim.config.state), "--config", config, status=1)
    assert "serve runs (pid 4711), but is not ready at http://127.0.0.1:1; wait, or name its address with --url" in err
    with pytest.raises(SystemExit):
        main(["bench", "--url", f"ftp://127.0.0.1:{shim_port}"])
    assert "must be a base URL" in capsys.readouterr().err


def test_without_a_server_one_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes and the demo model; afterwards the state is as it was: the next `serve` is a first start."""
    state = tmp_path / "state"
    document = json.loads(bench(capsys, "--state", str(state), "--json")[0])
    check(document)
    assert document["note"] == "started for this"
    assert list(state.iterdir()) == []


def test_a_server_that_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "tokenizer.json").touch()
    (tmp_path / "model" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    config = tmp_path / "edge.toml"
    config.write_text('[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "model"\n')
    _, err = bench(capsys, "--state", str(tmp_path / "state"), "--config", str(config), status=1)
    assert "the server for the measurement did not start: the engine could not start" in err


def test_fsync_and_copies_are_measured(tmp_path: Path) -> None:
    assert machine.fsync(tmp_path) > 0
    assert machine.memory_copy(2) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["https://user:secret@host", "ftp://host", "http://", "http://host?x=1", "http://host:99999", "http://h st"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="must be a base URL") as error:
        parse_server(url)
    assert "secret" not in str(error.value)


def test_urls() -> None:
    assert parse_server("https://api.example.com/v2").url == "https://api.example.com:443"
    assert parse_server("http://[::1]:8400/edge/").url == "http://[::1]:8400/edge"


def test_events_in_pieces() -> None:
    body = b'event: a\ndata: {"x":\ndata: 1}\n\n: comment\r\n\r\ndata: last\r\n\r\ndata: cut'
    expected = [("a", '{"x":\n1}'), ("message", "last")]
    for size in (1, 2, 7, 1000):
        assert list(events(body[i : i + size] for i in range(0, len(body), size))) == expected
