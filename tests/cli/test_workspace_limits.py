"""`workspaces create|set --requests-per-minute --tokens-per-day`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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
