"""The state directory of an earlier version, and of a later one: what the first command of this version makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from aiexport_edge.shim.cli.main import main
from aiexport_edge.shim.store import database

MIGRATIONS = Path(database.__file__).with_name("migrations")


def settings() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


REVISIONS = [script.revision for script in ScriptDirectory.from_config(settings()).walk_revisions()]


@pytest.mark.parametrize("revision", sorted(REVISIONS))
def test_an_earlier_one_is_brought_up_to_date(
    revision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'store.db'}")
    config = settings()
    config.attributes["engine"] = engine
    command.upgrade(config, revision)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO workspaces (id, name, plan, cache_salt, created_at) VALUES ('ws_1', 'acme', 'pro', x'00', 0)"
        )
        connection.exec_driver_sql(
            "INSERT INTO keys (id, workspace_id, hash, scopes, test, created_at) "
            "VALUES ('key_1', 'ws_1', x'00', 'messages', 0, 0)"
        )
    engine.dispose()
    assert main(["keys", "list", "--workspace", "acme", "--json", "--state", str(tmp_path)]) == 0
    (key,) = json.loads(capsys.readouterr().out)
    assert (key["key_id"], key["scopes"]) == ("key_1", ["messages"])
    assert main(["usage", "--workspace", "acme", "--json", "--state", str(tmp_path)]) == 0


def test_a_later_one_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workspaces", "create", "acme", "--plan", "pro", "--state", str(tmp_path)]) == 0
    engine = create_engine(f"sqlite:///{tmp_path / 'store.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    assert main(["workspaces", "list", "--state", str(tmp_path)]) == 1
    assert "made by a newer version of this program" in capsys.readouterr().err
