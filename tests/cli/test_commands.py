"""The command line as a person and a script use it: what it prints, where, and its exit status."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.edge import free_port

from aiexport_edge.proto.config import source_directory
from aiexport_edge.shim.cli.main import COMMANDS, main

KEY = re.compile(r"axp_live_[A-Za-z0-9_-]{43}")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state directory, and a working directory without a configuration."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


class Cli:
    """Runs commands in this process on one state directory."""

    def __init__(self, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state = state
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0) -> tuple[str, str]:
        """What the command printed on stdout and stderr."""
        self._capsys.readouterr()
        assert main([*words, "--state", str(self.state)]) == status
        captured = self._capsys.readouterr()
        return captured.out, captured.err

    def json(self, *words: str) -> Any:
        out, err = self(*words, "--json")
        assert err == ""
        return json.loads(out)


@pytest.fixture
def cli(state: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(state, capsys)


def model(directory: Path, weights: bytes = (2).to_bytes(8, "little") + b"{}") -> None:
    """A model's files: of the right names, with nothing in them."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").touch()
    (directory / "model.safetensors").write_bytes(weights)


def usage_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- all commands


def every_help() -> list[list[str]]:
    leaves = {
        "workspaces": ("create", "list", "show", "set", "delete"),
        "keys": ("create", "list", "rotate", "revoke"),
        "models": ("list", "verify", "import"),
        "config": ("check", "preset", "show"),
    }
    return [[], *([name] for name in COMMANDS), *([name, leaf] for name, found in leaves.items() for leaf in found)]


@pytest.mark.parametrize("words", every_help(), ids=" ".join)
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"example:\n +aiexport-edge {' '.join(words)}", text), text


def test_version_names_the_api(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert re.fullmatch(r"aiexport-edge \d+\.\d+\.\d+ \(API 2\.4\)\n", capsys.readouterr().out)


def test_bad_usage_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'nope' (choose from" in usage_error(capsys, "nope")
    assert "required: COMMAND" in usage_error(capsys)
    assert "required: ACTION" in usage_error(capsys, "keys")
    assert "invalid choice: 'gold'" in usage_error(capsys, "workspaces", "create", "acme", "--plan", "gold")
    assert "must be a duration such as 90d" in usage_error(
        capsys, "keys", "create", "--workspace", "a", "--expires", "soon"
    )
    assert "must be a date such as 2025-04-01" in usage_error(capsys, "usage", "--start", "yesterday")
    assert 'must be "HOST:PORT" or "unix:PATH"' in usage_error(capsys, "engine", "--listen", "somewhere")
    assert "must be a port from 1 to 65535, not '99999'" in usage_error(capsys, "serve", "--port", "99999")
    assert "unrecognized arguments: --works" in usage_error(capsys, "keys", "list", "--workspace", "a", "--works", "b")


def test_options_stand_before_or_after_the_command(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--state", str(state), "workspaces", "create", "acme", "--plan", "free"]) == 0
    assert main(["workspaces", "list", "--json", "--state", str(state)]) == 0
    assert '"name": "acme"' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- workspaces, keys


def test_life_of_a_workspace(cli: Cli) -> None:
    assert cli.json("workspaces", "list") == []
    made = cli.json("workspaces", "create", "acme", "--plan", "pro")
    assert (made["name"], made["plan"]) == ("acme", "pro")
    assert made["created_at"].endswith("Z")
    assert cli.json("workspaces", "show", "acme") == made
    assert cli.json("workspaces", "list") == [made]
    assert cli.json("workspaces", "set", "acme", "--plan", "enterprise") == {**made, "plan": "enterprise"}
    assert cli.json("workspaces", "delete", "acme") == {"name": "acme", "deleted": True}
    assert cli.json("workspaces", "list") == []


def test_life_of_a_key(cli: Cli) -> None:
    cli("workspaces", "create", "acme", "--plan", "pro")
    made = cli.json("keys", "create", "--workspace", "acme")
    assert list(made) == ["key_id", "key", "workspace", "scopes", "expires_at"]
    assert KEY.fullmatch(made["key"])
    assert (made["workspace"], made["scopes"], made["expires_at"]) == ("acme", ["messages", "batch", "usage"], None)
    test = cli.json("keys", "create", "--workspace", "acme", "--test", "--scope", "usage", "--expires", "90d")
    assert test["key"].startswith("axp_test_")
    assert test["scopes"] == ["usage"]
    assert test["expires_at"].endswith("Z")

    rotated = cli.json("keys", "rotate", made["key_id"], "--grace", "1h")
    assert list(rotated) == ["key_id", "key", "old_key_id", "old_expires_at"]
    assert rotated["old_key_id"] == made["key_id"]
    assert rotated["key"] != made["key"]

    listed = {key["key_id"]: key for key in cli.json("keys", "list", "--workspace", "acme")}
    assert set(listed) == {made["key_id"], test["key_id"], rotated["key_id"]}
    assert listed[made["key_id"]]["expires_at"] == rotated["old_expires_at"]
    assert not any("key" in key for key in listed.values())

    assert cli.json("keys", "revoke", test["key_id"]) == {"key_id": test["key_id"], "revoked": True}
    again = {key["key_id"]: key for key in cli.json("keys", "list", "--workspace", "acme")}
    assert again[test["key_id"]]["revoked_at"] is not None


def test_for_a_person(cli: Cli) -> None:
    assert "there are no workspaces; make one with" in cli("workspaces", "list")[1]
    assert "aiexport-edge keys create --workspace acme" in cli("workspaces", "create", "acme", "--plan", "pro")[0]
    assert re.search(r"^NAME +PLAN +CREATED_AT .*\nacme +pro +", cli("workspaces", "list")[0])
    assert re.search(r"^plan +pro$", cli("workspaces", "show", "acme")[0], re.MULTILINE)
    assert "acme has no keys" in cli("keys", "list", "--workspace", "acme")[1]
    out, err = cli("keys", "create", "--workspace", "acme")
    assert KEY.search(out)
    assert "only now" in err
    assert KEY.search(cli("keys", "list", "--workspace", "acme")[0]) is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("workspaces", "create", "acme", "--plan", "pro"), "acme already"),
        (("workspaces", "create", "Not-A-Name", "--plan", "pro"), "Not-A-Name"),
        (("workspaces", "show", "nope"), "no workspace named nope"),
        (("workspaces", "delete", "nope"), "no workspace named nope"),
        (("keys", "create", "--workspace", "nope"), "no workspace named nope"),
        (("keys", "create", "--workspace", "acme", "--scope", "root"), "'root'"),
        (("keys", "rotate", "key_nope"), "no key key_nope"),
        (("keys", "revoke", "key_nope"), "no key key_nope"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(cli: Cli, words: tuple[str, ...], expected: str) -> None:
    cli("workspaces", "create", "acme", "--plan", "pro")
    out, err = cli(*words, status=1)
    assert out == ""
    assert err.startswith("aiexport-edge: ")
    assert expected in err
    assert err.count("\n") == 1


def test_the_state_is_this_users_alone(cli: Cli) -> None:
    cli("workspaces", "list")
    assert cli.state.stat().st_mode & 0o777 == 0o700
    assert {file.name: file.stat().st_mode & 0o077 for file in cli.state.iterdir() if file.stat().st_mode & 0o077} == {}


def test_a_state_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["workspaces", "list", "--state", str(tmp_path / "file" / "state")]) == 1
    assert "name another with --state" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- config, models


def test_config_check_and_show(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text("[shim]\nport = 9000\n")
    assert "right; 3 models from 1 sets of weights" in cli("config", "check", str(file))[0]
    assert cli.json("config", "check", str(file))["file"] == str(file)
    assert "port = 9000" in cli("config", "show", "--config", str(file))[0]
    shown = cli.json("config", "show", "--config", str(file))
    assert shown["shim"]["port"] == 9000
    assert shown["admin"]["listen"] == "127.0.0.1:9001"

    text = cli("config", "preset", "--card", "24")[0]
    file.write_text(text)
    assert "Qwen3-VL-8B-Instruct: 8,767 million parameters" in cli("config", "check", str(file), "--card", "24")[0]
    assert cli.json("config", "check", str(file), "--card", "24")["card"]["gb"] == 24
    assert "a card of 8 GB has 8.0 GiB" in cli("config", "check", str(file), "--card", "8", status=1)[1]
    assert "there is no directory" in cli("config", "check", str(file), status=1)[1]
    assert "| 141 GB |" in cli("config", "preset")[0]
    assert "there are 8, 16, 24, 48, 80, 141" in cli("config", "preset", "--card", "12", status=1)[1]

    file.write_text("[shim]\nprot = 9000\n")
    assert cli("config", "check", str(file), status=1)[1] == (
        f'aiexport-edge: {file}:2: shim.prot: unknown key; did you mean "port"?\n'
    )
    assert cli("workspaces", "list", "--config", str(file), status=1)[0] == ""
    assert "there is no such file" in cli("config", "show", "--config", str(tmp_path / "none.toml"), status=1)[1]


def test_config_check_looks_for_the_models(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "edge.toml"
    file.write_text('[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "nowhere"\n')
    assert f"there is no directory {tmp_path}/nowhere" in cli("config", "check", str(file), status=1)[1]
    file.write_text('[shim]\nengines = ["e.internal:50051"]\n' + file.read_text())
    assert "nowhere: not on this machine" in cli("config", "check", str(file))[0]
    model(tmp_path / "cut", b"not yet all of it")
    file.write_text('[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "cut"\n')
    assert "cut/model.safetensors is cut short" in cli("config", "check", str(file), status=1)[1]


def test_models(cli: Cli) -> None:
    listed = cli.json("models", "list")
    assert [model["family"] for model in listed] == ["opus", "sonnet", "haiku"]
    assert all(model["complete"] for model in listed)
    verified = cli.json("models", "verify")
    assert [weights["weights"] for weights in verified] == ["demo"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", file["sha256"]) for file in verified[0]["files"])
    assert cli("models", "verify", "apex-haiku-4-20250401")[0].endswith("demo: complete\n")
    assert (
        "nope is not served here; the models are apex-opus-3-20250401" in cli("models", "verify", "nope", status=1)[1]
    )


# ---------------------------------------------------------------------------------------------------- doctor


def test_doctor_finds_nothing(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(f'[shim]\nport = {free_port()}\n[admin]\nlisten = "127.0.0.1:{free_port()}"\n')
    found = cli.json("doctor", "--config", str(tmp_path / "edge.toml"))
    assert found["ok"] is True
    names = {check["name"] for check in found["checks"]}
    assert {
        "python",
        "torch",
        "processor",
        "bf16",
        "memory",
        "disk",
        "store",
        "port",
        "admin port",
        "model demo",
    } <= names


def test_doctor_names_each_problem_and_its_remedy(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        file = tmp_path / "edge.toml"
        file.write_text(
            f'[shim]\nport = {port}\n[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "half"\n'
            f'[store]\nurl = "postgresql://nobody@127.0.0.1:{free_port()}/x"\n'
            f'[admin]\nlisten = "127.0.0.1:{free_port()}"\n'
        )
        out, _ = cli("doctor", "--config", str(file), "--json", status=1)
    problems = {check["name"]: check for check in json.loads(out)["checks"] if check["status"] == "problem"}
    assert set(problems) == {"model half", "port", "store"}
    assert all(check["remedy"] for check in problems.values())
    assert "tokenizer.json is missing" in problems["model half"]["detail"]

    file.write_text("[nothing]\n")
    out, _ = cli("doctor", "--config", str(file), status=1)
    assert "problem  configuration: " in out


# ---------------------------------------------------------------------------------------------------- as a process


def run(*words: str, cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240, check=False, **more)


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "config", "show", "--state", str(tmp_path / "s")]
    with os.fdopen(write_end, "w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_full_or_closed_stdout_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "config", "show", "--state", str(tmp_path / "s")]
    with open("/dev/full", "w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    sentence = "aiexport-edge: the output cannot be written: No space left on device; make room, or write elsewhere\n"
    assert (done.returncode, done.stderr) == (1, sentence)
    closed = ["/bin/sh", "-c", f"{shlex.join(command)} >&-"]
    done = subprocess.run(closed, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_busy_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("serve", "--state", "s", "--port", port, cwd=tmp_path)
    expected = (
        f"aiexport-edge: 127.0.0.1:{port} is taken by another program; stop it, or choose another port with --port\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_an_engine_that_cannot_start_ends_serve(tmp_path: Path) -> None:
    """What no restart can mend is said once; `serve` does not go on trying."""
    model(tmp_path / "model")
    (tmp_path / "edge.toml").write_text('[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "model"\n')
    ports = ("--port", str(free_port()), "--admin-port", str(free_port()))
    done = run("serve", "--state", "s", "--config", "edge.toml", *ports, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("the engine could not start; its last message above says why\n")
    assert "Traceback" not in done.stderr


def test_weights_that_cannot_be_loaded_end_serve(tmp_path: Path) -> None:
    """Found only when the core reads them: nothing would ever be served."""
    shutil.copytree(source_directory("demo"), tmp_path / "model")
    model(tmp_path / "model")  # no tensor in it
    shutil.copy(source_directory("demo") / "config.json", tmp_path / "model")
    (tmp_path / "edge.toml").write_text('[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "model"\n')
    ports = ("--port", str(free_port()), "--admin-port", str(free_port()))
    done = run("serve", "--state", "s", "--config", "edge.toml", *ports, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "aiexport-edge: no model could be loaded; the engine's messages above say why\n" in done.stderr
