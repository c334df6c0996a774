"""`workspaces create|set` with limits; what `doctor` and the commands say where Redis or the store is silent."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from support.redis import MISSING, RedisServer

from aiexport_edge.shim.cli.main import main


def test_limits_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> Any:
        assert main(["workspaces", *words, "--json", "--state", str(tmp_path)]) == 0
        return json.loads(capsys.readouterr().out)

    def limits(document: Any) -> tuple[Any, Any]:
        return document["requests_per_minute"], document["tokens_per_day"]

    made = run("create", "acme", "--plan", "enterprise", "--requests-per-minute", "3000")
    assert limits(made) == (3000, None)  # null: the plan's
    assert limits(run("set", "acme", "--tokens-per-day", "5", "--requests-per-minute", "unlimited")) == ("unlimited", 5)
    changed = run("set", "acme", "--tokens-per-day", "plan", "--plan", "pro")
    assert (changed["plan"], *limits(changed)) == ("pro", "unlimited", None)
    assert run("show", "acme") == run("list")[0] == changed
    assert main(["workspaces", "set", "acme", "--state", str(tmp_path)]) == 1
    assert "nothing to change" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "many", "1000001", "1" * 30])
def test_what_is_no_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["workspaces", "set", "acme", f"--requests-per-minute={limit}", "--state", str(tmp_path)])
    assert ended.value.code == 2
    assert 'from 1 to 1000000, "unlimited" or "plan"' in capsys.readouterr().err


def test_doctor_asks_redis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip(MISSING)
    redis = RedisServer(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(f'[limits]\nredis_url = "{redis.url}"\n')

    def finding() -> Any:
        main(["doctor", "--json", "--config", str(config), "--state", str(tmp_path / "state")])
        (found,) = (check for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "redis")
        return found

    assert finding()["status"] == "problem"
    assert "redis_url" in finding()["remedy"]
    redis.start()
    assert (finding()["status"], finding()["remedy"]) == ("ok", "")
    redis.stop()


def test_a_command_says_why_the_store_is_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["workspaces", "create", "acme", "--plan", "pro", "--state", str(tmp_path)]) == 0
    monkeypatch.setattr("aiexport_edge.shim.store.database.BUSY_TIMEOUT_MS", 50)
    holder = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    assert main(["workspaces", "set", "acme", "--plan", "free", "--state", str(tmp_path)]) == 1
    holder.close()
    said = capsys.readouterr().err
    assert "holds the store's lock" in said
    assert "Traceback" not in said
