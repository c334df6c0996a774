"""The command line where what it is run in is not as it should be: closed streams, other encodings, other users."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from aiexport_edge.shim.cli.main import COMMANDS, main
from aiexport_edge.shim.store import open_store

PROGRAM = (sys.executable, "-m", "aiexport_edge.shim.cli.main")


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of sh in which `EDGE` stands for the program, on the state directory `state`."""
    line = line.replace("EDGE", shlex.join(PROGRAM))
    return subprocess.run(
        ["/bin/sh", "-c", line],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=240,
        check=False,
    )


def test_with_stderr_closed_nothing_but_the_document_is_on_stdout(tmp_path: Path) -> None:
    assert main(["workspaces", "create", "acme", "--plan", "pro", "--state", str(tmp_path / "state")]) == 0
    done = shell("EDGE oauth-clients create --workspace acme --state state --json 2>&-", tmp_path)
    assert set(json.loads(done.stdout)) == {"client_id", "client_secret"}


def test_with_stdin_closed_nobody_is_asked(tmp_path: Path) -> None:
    done = shell("EDGE operator password --state state <&-", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "a password needs at least 10 characters; nothing was changed" in done.stderr


def test_modules_of_the_working_directory_are_not_taken(tmp_path: Path) -> None:
    """As the installed program: what it starts finds no `queue.py` of the user's."""
    program = Path(sys.executable).with_name("aiexport-edge")
    if not program.exists():
        pytest.skip("the program is not installed beside this Python")
    for name in ("queue", "json", "jinja2"):
        (tmp_path / f"{name}.py").write_text('raise SystemExit("a module of the working directory")\n')
    done = shell(f"{shlex.quote(str(program))} config check --state state", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_a_command_starts_has_the_streams_that_were_closed(tmp_path: Path) -> None:
    """Else a socket of its own would be what the engine logs to."""
    code = (
        "import subprocess, sys; from aiexport_edge.shim.cli.main import main; main(['models', 'list']); "
        "asked = 'import os; [os.fstat(number) for number in range(3)]'; "
        "sys.exit(subprocess.run([sys.executable, '-c', asked]).returncode)"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", f"{shlex.join([sys.executable, '-c', code])} <&- >&- 2>&-"], cwd=tmp_path, check=False
    )
    assert done.returncode == 0


def test_other_encodings(tmp_path: Path) -> None:
    (tmp_path / "edge.toml").write_text(
        '[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "demo"\ndisplay_name = "é"\n'
    )
    shown = shell("EDGE config show --json --config edge.toml", tmp_path, PYTHONIOENCODING="ascii")
    assert json.loads(shown.stdout)["models"][0]["display_name"] == "é"
    shown = shell("EDGE config show --config edge.toml", tmp_path, PYTHONIOENCODING="ascii")
    assert (shown.returncode, shown.stderr) == (0, "")


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    state = os.fsdecode(os.fsencode(tmp_path) + b"/\xff/state")
    command = [*PROGRAM, "config", "show", "--json", "--state", state]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["store"]["url"].endswith("/\udcff/state/store.db")


def test_places_may_have_the_names_of_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--state", "keys", "workspaces", "create", "acme", "--plan", "pro"]) == 0
    assert main(["--state", "keys", "keys", "list", "--workspace", "acme", "--json"]) == 0
    assert capsys.readouterr().out.endswith("[]\n")


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
    assert "example:" in capsys.readouterr().out


def test_a_line_to_paste_is_for_the_same_installation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "a state")
    assert main(["workspaces", "create", "acme", "--plan", "pro", "--state", state]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert main([*shlex.split(line)[1:], "--json"]) == 0


def test_spaces_and_letters_in_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ein Ördner #1"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "aiexport-edge.toml").write_text("")
    assert main(["workspaces", "create", "acme", "--plan", "pro", "--state", "mein stätte"]) == 0
    assert (folder / "mein stätte" / "store.db").is_file()
    assert main(["config", "check"]) == 0
    assert main(["workspaces", "list", "--state", "what?"]) == 1
    assert "has a ? in its path; name another with --state" in capsys.readouterr().err


def test_a_path_that_sqlite_cannot_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path.joinpath(*["deep" * 50] * 3)
    assert main(["workspaces", "list", "--state", str(state)]) == 1
    assert "is longer than SQLite's 500 bytes; name a shorter --state or [store] url" in capsys.readouterr().err


def test_a_store_that_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database" * 1000)
    (tmp_path / "store.db").chmod(0o600)
    assert main(["workspaces", "list", "--state", str(tmp_path)]) == 1
    assert "is no database; restore it from a backup" in capsys.readouterr().err
    assert "restore it from a backup" in doctor(capsys, "--state", str(tmp_path))["store"]["remedy"]


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    done = shell(f"mkdir gone && cd gone && rmdir ../gone && EDGE models list --state {tmp_path}/state", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "the working directory cannot be looked into" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to others")
def test_what_root_makes_belongs_to_the_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With sudo on the state directory of a service that runs as a user of its own."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    os.chown(state, 12345, 12346)
    (state / "linked").write_text("")
    os.link(state / "linked", tmp_path / "elsewhere")
    assert main(["workspaces", "create", "acme", "--plan", "pro", "--state", str(state)]) == 0
    assert main(["webhooks", "secret", "--workspace", "acme", "--state", str(state)]) == 0
    owners = {path.name: (path.lstat().st_uid, path.lstat().st_gid) for path in state.iterdir()}
    assert owners.pop("linked") == (0, 0)
    assert {"store.db", "master.key"} <= set(owners)
    assert set(owners.values()) == {(12345, 12346)}
    assert stat.S_IMODE((state / "master.key").stat().st_mode) == 0o600


def doctor(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    main(["doctor", "--json", *words])
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


def test_doctor_on_a_front_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engines have them: that is as it should be."""
    file = tmp_path / "edge.toml"
    model = '[[models]]\nids = ["a"]\nfamily = "opus"\nsource = "/srv/nowhere"\n'
    file.write_text(model)
    places = ("--config", str(file), "--state", str(tmp_path / "state"))
    assert doctor(capsys, *places)["model nowhere"]["status"] == "problem"
    file.write_text(f'[shim]\nengines = ["unix:{tmp_path}/none.sock"]\n' + model)
    assert doctor(capsys, *places)["model nowhere"]["status"] == "ok"


def test_doctor_where_the_state_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    found = doctor(capsys, "--state", str(tmp_path / "file" / "state"))["state"]
    assert (found["status"], found["remedy"]) == (
        "problem",
        "give this user the right (chown), or name another place with --state",
    )


def test_doctor_sees_a_clock_that_was_set_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    store = open_store(f"sqlite:///{state / 'store.db'}")
    places = ("--state", str(state))
    assert doctor(capsys, *places)["clock"]["status"] == "ok"
    with store.database.begin() as connection:
        connection.exec_driver_sql("INSERT INTO uptime (id, started_at, ended_at) VALUES ('up_x', 0, 4102444800000)")
    store.close()
    found = doctor(capsys, *places)["clock"]
    assert found["status"] == "problem"
    assert "days" in found["detail"]
    assert "timedatectl" in found["remedy"]


def test_doctor_names_what_is_wrong_with_the_master_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ("--state", str(tmp_path / "state"))
    assert main(["workspaces", "create", "acme", "--plan", "pro", *places]) == 0
    assert main(["webhooks", "secret", "--workspace", "acme", *places]) == 0
    (tmp_path / "state" / "master.key").chmod(0o644)
    found = doctor(capsys, *places)["master key"]
    assert found["status"] == "problem"
    assert "chmod 600" in found["detail"]
