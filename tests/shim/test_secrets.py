"""The master key and what is sealed under it: made once, kept private, rotated, and what each loss looks like."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiexport_edge.shim.secrets import MasterKeys, SecretBox, SecretError

PURPOSE = "a test"


def box(state: Path, **environ: str) -> SecretBox:
    return SecretBox(MasterKeys(state, environ=environ))


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_sealed_opens_again_in_another_process(state: Path) -> None:
    sealed = box(state).seal(b"secret", purpose=PURPOSE)
    assert b"secret" not in sealed
    assert box(state).open(sealed, purpose=PURPOSE) == b"secret"
    assert box(state).seal(b"secret", purpose=PURPOSE) != sealed
    assert (state / "master.key").stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700


def test_nothing_is_made_before_it_is_needed(state: Path) -> None:
    keys = MasterKeys(state, environ={})
    assert keys.all() == ()
    assert not state.exists()


@given(plaintext=st.binary(max_size=300), position=st.integers(0), change=st.integers(1, 255))
def test_what_was_altered_does_not_open(plaintext: bytes, position: int, change: int) -> None:
    made = box(Path("/nowhere"), AIEXPORT_MASTER_KEY=base64.b64encode(b"k" * 32).decode())
    sealed = bytearray(made.seal(plaintext, purpose=PURPOSE))
    assert made.open(bytes(sealed), purpose=PURPOSE) == plaintext
    sealed[position % len(sealed)] ^= change
    with pytest.raises(SecretError):
        made.open(bytes(sealed), purpose=PURPOSE)


def test_a_secret_serves_its_purpose_alone(state: Path) -> None:
    sealed = box(state).seal(b"secret", purpose=PURPOSE)
    with pytest.raises(SecretError, match="damaged"):
        box(state).open(sealed, purpose="another")


def test_rotation_reaches_who_is_running(state: Path) -> None:
    """The newest seals, all open; a process that has read the file before sees the change."""
    running, other = box(state), box(state)
    old = running.seal(b"old", purpose=PURPOSE)
    first = running.keys.newest()
    second = other.keys.rotate()
    assert [key.id for key in running.keys.all()] == [second.id, first.id]
    new = running.seal(b"new", purpose=PURPOSE)
    assert new[1:9] == second.id
    assert other.open(old, purpose=PURPOSE) == b"old"
    other.keys.keep([second.id])
    assert running.open(new, purpose=PURPOSE) == b"new"
    with pytest.raises(SecretError, match=f"master key {first.id.hex()}, which is not here"):
        running.open(old, purpose=PURPOSE)


def test_the_environment_comes_before_the_file(state: Path) -> None:
    in_file = box(state).seal(b"file", purpose=PURPOSE)
    first, second = (base64.b64encode(bytes([n]) * 32).decode() for n in (1, 2))
    before = box(state, AIEXPORT_MASTER_KEY=first)
    after = box(state, AIEXPORT_MASTER_KEY=f"{second}, {first}")
    sealed = before.seal(b"environment", purpose=PURPOSE)
    assert after.open(sealed, purpose=PURPOSE) == b"environment"
    assert after.seal(b"", purpose=PURPOSE)[1:9] == after.keys.all()[0].id != before.keys.newest().id
    with pytest.raises(SecretError, match="not here"):
        before.open(in_file, purpose=PURPOSE)
    with pytest.raises(SecretError, match="AIEXPORT_MASTER_KEY: put a new one before the others"):
        before.keys.rotate()


@pytest.mark.parametrize("text", ["", "# nothing", "short", "%%%", base64.b64encode(b"k" * 31).decode()])
def test_what_is_no_master_key(state: Path, text: str) -> None:
    with pytest.raises(SecretError, match="32 random bytes in base64") as error:
        box(state, AIEXPORT_MASTER_KEY=text).seal(b"", purpose=PURPOSE)
    assert text == "" or text.strip("# ") not in str(error.value)


def test_a_file_that_others_can_read_is_refused(state: Path) -> None:
    made = box(state)
    made.seal(b"", purpose=PURPOSE)
    made.keys.file.chmod(0o640)
    with pytest.raises(SecretError, match="chmod 600"):
        made.seal(b"", purpose=PURPOSE)


def test_no_new_key_where_secrets_are_sealed_under_another(state: Path) -> None:
    keys = MasterKeys(state, environ={}, allow_new=lambda: False)
    with pytest.raises(SecretError, match=r"Copy master\.key from the machine that made it"):
        keys.newest()
    assert not state.exists()


def test_processes_that_start_together_agree_on_one(state: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom aiexport_edge.shim.secrets import MasterKeys\n"
        "sys.stdin.readline()\nprint(MasterKeys(Path(sys.argv[1])).newest().id.hex())"
    )
    environ = {name: value for name, value in os.environ.items() if name != "AIEXPORT_MASTER_KEY"}
    command = [sys.executable, "-c", code, str(state)]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        for _ in range(4)
    ]
    made = {process.communicate("\n")[0] for process in started}
    assert made == {box(state).keys.newest().id.hex() + "\n"}


def test_a_key_does_not_show_itself(state: Path) -> None:
    key = MasterKeys(state, environ={}).newest()
    assert repr(key.secret) not in repr(key)
    assert base64.b64encode(key.secret).decode() in (state / "master.key").read_text()
