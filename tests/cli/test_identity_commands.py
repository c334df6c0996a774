"""OAuth clients, signing keys, the master key and the operator's password on the command line."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.edge import free_port

from aiexport_edge.shim.auth.operator import verify_password
from aiexport_edge.shim.cli.main import main
from aiexport_edge.shim.secrets import MasterKeys, SecretBox
from aiexport_edge.shim.store import open_store
from aiexport_edge.shim.store.operator_rows import OperatorLogin

SECRET = re.compile(r"axp_secret_[A-Za-z0-9_-]{43}")


class Cli:
    """Runs commands in this process on one state directory."""

    def __init__(self, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.state = state
        self._capsys = capsys

    def __call__(self, *words: str, status: int = 0) -> tuple[str, str]:
        self._capsys.readouterr()
        assert main([*words, "--state", str(self.state)]) == status
        captured = self._capsys.readouterr()
        return captured.out, captured.err

    def json(self, *words: str) -> Any:
        out, err = self(*words, "--json")
        assert err == ""
        return json.loads(out)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AIEXPORT_MASTER_KEY", raising=False)
    return Cli(tmp_path / "state", capsys)


def test_life_of_an_oauth_client(cli: Cli) -> None:
    cli("workspaces", "create", "acme", "--plan", "enterprise")
    assert "there are no OAuth clients" in cli("oauth-clients", "list")[1]
    made = cli.json("oauth-clients", "create", "--workspace", "acme")
    assert list(made) == ["client_id", "client_secret"]
    assert made["client_id"].startswith("client_")
    assert SECRET.fullmatch(made["client_secret"])
    narrow = cli.json("oauth-clients", "create", "--workspace", "acme", "--scope", "usage", "--scope", "keys")

    listed = {client["client_id"]: client for client in cli.json("oauth-clients", "list", "--workspace", "acme")}
    assert listed[made["client_id"]]["scopes"] == ["messages", "batch", "usage"]
    assert listed[narrow["client_id"]]["scopes"] == ["usage", "keys"]
    assert not any("secret" in name and "old" not in name for client in listed.values() for name in client)
    assert SECRET.search(cli("oauth-clients", "list")[0]) is None

    rotated = cli.json("oauth-clients", "rotate-secret", made["client_id"], "--grace", "1h")
    assert list(rotated) == ["client_id", "client_secret", "old_secret_expires_at"]
    assert rotated["client_secret"] != made["client_secret"]
    out, err = cli("oauth-clients", "rotate-secret", made["client_id"])
    assert SECRET.search(out)
    assert "only now" in err

    revoked = cli.json("oauth-clients", "revoke", made["client_id"])
    assert revoked == {"client_id": made["client_id"], "revoked": True}
    assert "is revoked" in cli("oauth-clients", "rotate-secret", made["client_id"], status=1)[1]
    again = {client["client_id"]: client for client in cli.json("oauth-clients", "list")}
    assert again[made["client_id"]]["revoked_at"] is not None
    cli("workspaces", "delete", "acme")
    assert cli.json("oauth-clients", "list") == []


def test_a_client_of_another_plan_is_made_with_a_word(cli: Cli) -> None:
    cli("workspaces", "create", "acme", "--plan", "pro")
    out, err = cli("oauth-clients", "create", "--workspace", "acme", "--json")
    assert json.loads(out)["client_id"]
    assert "acme is on plan pro: it gets tokens once it is on enterprise" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("oauth-clients", "create", "--workspace", "nope"), "no workspace named nope"),
        (("oauth-clients", "create", "--workspace", "acme", "--scope", "root"), "'root'"),
        (("oauth-clients", "list", "--workspace", "nope"), "no workspace named nope"),
        (("oauth-clients", "rotate-secret", "client_no"), "no OAuth client client_no"),
        (("oauth-clients", "revoke", "client_no"), "no OAuth client client_no"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(cli: Cli, words: tuple[str, ...], expected: str) -> None:
    cli("workspaces", "create", "acme", "--plan", "enterprise")
    out, err = cli(*words, status=1)
    assert (out, err.count("\n")) == ("", 1)
    assert expected in err


@pytest.mark.parametrize(
    "words",
    [
        *(("oauth-clients", *leaf) for leaf in ((), ("create",), ("list",), ("rotate-secret",), ("revoke",))),
        *(("signing-keys", *leaf) for leaf in ((), ("rotate",), ("list",))),
        *(("master-key", *leaf) for leaf in ((), ("rotate",), ("list",), ("reseal",), ("prune",))),
        *(("operator", *leaf) for leaf in ((), ("password",))),
    ],
    ids=" ".join,
)
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words, "--help"])
    assert end.value.code == 0
    assert re.search(rf"example:\n +aiexport-edge {' '.join(words)}", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------- signing keys


def test_signing_keys(cli: Cli) -> None:
    assert cli.json("signing-keys", "list") == []
    first = cli.json("signing-keys", "rotate")
    assert (first["signs"], first["verifies_until"], first["dropped"]) == (True, None, 0)
    second = cli.json("signing-keys", "rotate")
    listed = cli.json("signing-keys", "list")
    assert [(key["key_id"], key["signs"]) for key in listed] == [(second["key_id"], True), (first["key_id"], False)]
    assert listed[1]["verifies_until"] > listed[1]["retired_at"]
    assert "private" not in json.dumps(listed)
    third = cli.json("signing-keys", "rotate", "--end-tokens")
    assert third["dropped"] == 2
    assert [key["key_id"] for key in cli.json("signing-keys", "list")] == [third["key_id"]]


# ---------------------------------------------------------------------------------------------------- master key


def test_master_key(cli: Cli) -> None:
    assert cli.json("master-key", "list") == []
    assert "no master key yet" in cli("master-key", "list")[1]
    cli("signing-keys", "rotate")
    file = cli.state / "master.key"
    assert file.stat().st_mode & 0o777 == 0o600
    (only,) = cli.json("master-key", "list")
    assert only == {"id": only["id"], "use": "seals", "sealed": 1, "where": str(file)}

    rotated = cli.json("master-key", "rotate")
    assert rotated == {"id": rotated["id"], "resealed": 1, "lost": 0}
    listed = cli.json("master-key", "list")
    assert [(key["id"], key["use"], key["sealed"]) for key in listed] == [
        (rotated["id"], "seals", 1),
        (only["id"], "opens", 0),
    ]
    assert cli.json("master-key", "prune") == {"kept": [rotated["id"]], "dropped": 1}
    assert cli.json("master-key", "prune") == {"kept": [rotated["id"]], "dropped": 0}
    assert len(cli.json("master-key", "list")) == 1
    assert cli.json("signing-keys", "rotate")["signs"]


def test_the_master_key_moves_to_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("signing-keys", "rotate")
    file = cli.state / "master.key"
    key = file.read_text().splitlines()[-1]
    file.unlink()
    monkeypatch.setenv("AIEXPORT_MASTER_KEY", key)
    assert [(row["use"], row["sealed"], row["where"]) for row in cli.json("master-key", "list")] == [
        ("seals", 1, "environment")
    ]
    assert "AIEXPORT_MASTER_KEY: put a new one before" in cli("master-key", "rotate", status=1)[1]
    new = base64.b64encode(os.urandom(32)).decode()
    monkeypatch.setenv("AIEXPORT_MASTER_KEY", f"{new},{key}")
    assert cli.json("master-key", "reseal")["resealed"] == 1
    monkeypatch.setenv("AIEXPORT_MASTER_KEY", new)
    assert [row["use"] for row in cli.json("master-key", "list")] == ["seals"]
    assert not file.exists()


def test_a_lost_master_key(cli: Cli) -> None:
    """Nothing pretends that all is well, and there is a way on."""
    cli("signing-keys", "rotate")
    (lost,) = cli.json("master-key", "list")
    (cli.state / "master.key").unlink()
    assert [row["use"] for row in cli.json("master-key", "list")] == ["missing"]
    assert "Copy master.key from the machine that made it" in cli("signing-keys", "rotate", status=1)[1]
    found = {check["name"]: check for check in json.loads(cli("doctor", "--json", status=1)[0])["checks"]}
    assert lost["id"] in found["master key"]["detail"]
    out, err = cli("master-key", "rotate", "--json", status=1)
    assert json.loads(out)["lost"] == 1
    assert "signing-keys rotate" in err
    cli("signing-keys", "rotate", "--end-tokens")
    assert [row["use"] for row in cli.json("master-key", "list")] == ["seals"]


# ---------------------------------------------------------------------------------------------------- operator


def stored(cli: Cli) -> str | None:
    store = open_store(f"sqlite:///{cli.state / 'store.db'}")
    try:
        return OperatorLogin(store.database).password_hash()
    finally:
        store.close()


def test_operator_password(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("correct horse\nnot this\n"))
    assert cli.json("operator", "password") == {"user": "operator", "password_set": True}
    found = stored(cli)
    assert found is not None
    assert verify_password("correct horse", found)
    monkeypatch.setattr("sys.stdin", io.StringIO("short\n"))
    assert "at least 10 characters" in cli("operator", "password", status=1)[1]
    assert stored(cli) == found
    assert cli.json("operator", "password", "--remove") == {"user": "operator", "password_set": False}
    assert stored(cli) is None


def test_operator_password_at_a_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["correct horse", "correct house", "correct horse", "correct horse"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(typed))
    assert "are not the same" in cli("operator", "password", status=1)[1]
    assert stored(cli) is None
    out, _ = cli("operator", "password")
    assert "asks for user operator" in out
    assert "correct horse" not in out
    assert stored(cli) is not None


def test_a_reachable_admin_listener_needs_a_login(cli: Cli, tmp_path: Path) -> None:
    """`serve` and `shim` do not open it without one, and `doctor` says so."""
    file = tmp_path / "edge.toml"
    file.write_text(f'[shim]\nport = {free_port()}\n[admin]\nlisten = "0.0.0.0:{free_port()}"\nplain_http = true\n')
    places = ["--config", str(file), "--state", str(cli.state)]
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main"]

    def refused(*words: str) -> None:
        done = subprocess.run([*command, *words, *places], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert "has no login; set one with: aiexport-edge operator password" in done.stderr
        assert done.stderr.count("\n") == 1

    def found() -> dict[str, Any]:
        out, _ = cli("doctor", "--config", str(file), "--json", status=1)
        return {check["name"]: check for check in json.loads(out)["checks"] if check["status"] == "problem"}

    assert set(found()) == {"admin login"}
    assert not cli.state.exists()
    refused("shim", "--engine", "127.0.0.1:1")
    refused("serve")
    assert set(found()) == {"admin login"}
    done = subprocess.run(
        [*command, "operator", "password", *places], input="correct horse\n", capture_output=True, text=True, check=True
    )
    assert "user operator" in done.stdout
    assert json.loads(cli("doctor", "--config", str(file), "--json")[0])["ok"]


def test_webhook_and_signing_secrets_share_the_master_key(cli: Cli) -> None:
    """What one process has sealed, another opens: the box of the command line is that of the server."""
    cli("signing-keys", "rotate")
    box = SecretBox(MasterKeys(cli.state, environ={}))
    assert box.open(box.seal(b"x", purpose="webhook secret"), purpose="webhook secret") == b"x"
    (key,) = cli.json("master-key", "list")
    assert box.keys.newest().id.hex() == key["id"]
