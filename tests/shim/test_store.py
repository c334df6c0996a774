"""The store: migrations, privacy of its files, workspaces and keys."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from aiexport_edge.shim.store import InvalidValue, Missing, NameTaken, Store, StoreError, WrongSchema, open_store
from aiexport_edge.shim.store import database as database_module
from aiexport_edge.shim.store.keys import KEY_PATTERN, hash_key
from aiexport_edge.shim.store.schema import REVISION, metadata


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = open_store(store_url)
    opened.create_workspace("acme", "pro")
    yield opened
    opened.close()


def test_files_are_private(tmp_path: Path) -> None:
    directory = tmp_path / "state"
    store = open_store(f"sqlite:///{directory}/store.db")
    store.create_workspace("acme", "pro")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert len(list(directory.iterdir())) >= 3
    for file in directory.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    store.close()


def test_migrations_end_at_the_tables_of_the_schema(store: Store) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(database_module.__file__).with_name("migrations")))
    assert ScriptDirectory.from_config(config).get_heads() == [REVISION]
    with store.database.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_current_database_is_opened_without_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    open_store(url).close()
    script = f"""
import sys
from aiexport_edge.shim.store import open_store
open_store({url!r})
print('alembic' in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_several_processes_may_make_it_at_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    script = f"from aiexport_edge.shim.store import open_store; print(open_store({url!r}).generation())"
    started = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out.strip()) == (0, "0"), err


def test_a_database_of_a_newer_version(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"
    opened = open_store(url)
    with opened.database.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    opened.close()
    with pytest.raises(WrongSchema, match="newer version"):
        open_store(url)


@pytest.mark.parametrize("url", ["nonsense", "nodb://x/y", "sqlite:////proc/nope/store.db"])
def test_urls_that_can_not_be(url: str) -> None:
    with pytest.raises(StoreError):
        open_store(url)


def test_what_is_no_database(tmp_path: Path) -> None:
    file = tmp_path / "store.db"
    file.write_bytes(b"this is no database, whatever its name says" * 100)
    with pytest.raises(StoreError, match="can't be opened"):
        open_store(f"sqlite:///{file}")


def test_workspaces(store: Store) -> None:
    made = store.create_workspace("beta_2", "free")
    assert made.id.startswith("ws_")
    assert made == store.get_workspace("beta_2")
    assert [workspace.name for workspace in store.list_workspaces()] == ["acme", "beta_2"]
    assert store.update_workspace("beta_2", plan="enterprise").plan == "enterprise"
    with pytest.raises(NameTaken):
        store.create_workspace("acme", "pro")
    for name in ("", "A", "a-b", "_a", "a" * 64, "ä", "a\n"):
        with pytest.raises(InvalidValue):
            store.create_workspace(name, "pro")
    with pytest.raises(InvalidValue):
        store.create_workspace("gamma", "gold")
    with pytest.raises(InvalidValue):
        store.update_workspace("acme", plan="gold")
    for call in (store.get_workspace, store.delete_workspace, store.list_keys, store.create_key):
        with pytest.raises(Missing):
            call("nope")


def test_a_deleted_workspace_frees_its_name_and_ends_its_keys(store: Store) -> None:
    old = store.get_workspace("acme")
    key = store.create_key("acme")
    store.delete_workspace("acme")
    assert store.find_principal(hash_key(key.key)) is None
    assert store.list_workspaces() == []
    again = store.create_workspace("acme", "free")
    assert again.id != old.id
    assert store.list_keys("acme") == []


def test_cache_salts_differ(store: Store) -> None:
    store.create_workspace("beta", "pro")
    keys = [store.create_key(name).key for name in ("acme", "beta", "acme")]
    principals = [store.find_principal(hash_key(key)) for key in keys]
    salts = [principal.cache_salt for principal in principals if principal is not None]
    assert salts[0] == salts[2] != salts[1]


def test_keys(store: Store) -> None:
    made = store.create_key("acme", scopes=["usage", "messages", "usage"], expires_in=timedelta(days=90), test=True)
    assert KEY_PATTERN.fullmatch(made.key)
    assert made.key.startswith("axp_test_")
    assert made.scopes == ("usage", "messages")
    principal = store.find_principal(hash_key(made.key))
    assert principal is not None
    assert (principal.key_id, principal.workspace, principal.plan) == (made.key_id, "acme", "pro")
    assert principal.scopes == {"usage", "messages"}
    assert made.expires_at is not None
    assert abs(made.expires_at - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=1)
    assert store.create_key("acme").scopes == ("messages", "batch", "usage")
    with pytest.raises(InvalidValue):
        store.create_key("acme", scopes=["admin"])
    with pytest.raises(InvalidValue):
        store.create_key("acme", scopes=[])
    listed = store.list_keys("acme")
    assert len(listed) == 2
    (first,) = [key for key in listed if key.key_id == made.key_id]
    assert first.test
    assert not hasattr(first, "key")


def test_revocation(store: Store) -> None:
    made = store.create_key("acme")
    store.revoke_key(made.key_id)
    first = store.list_keys("acme")[0].revoked_at
    assert first is not None
    assert store.find_principal(hash_key(made.key)) is None
    store.revoke_key(made.key_id)
    assert store.list_keys("acme")[0].revoked_at == first
    with pytest.raises(Missing):
        store.revoke_key("key_nope")
    with pytest.raises(InvalidValue):
        store.rotate_key(made.key_id, timedelta(hours=1))


def test_rotation(store: Store) -> None:
    made = store.create_key("acme", scopes=["usage"], expires_in=timedelta(days=10), test=True)
    rotated = store.rotate_key(made.key_id, timedelta(hours=1))
    assert rotated.old_key_id == made.key_id
    assert abs(rotated.old_expires_at - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=1)
    listed = {key.key_id: key for key in store.list_keys("acme")}
    old, new = listed[made.key_id], listed[rotated.key_id]
    assert (new.scopes, new.test) == (("usage",), True)
    assert new.expires_at is not None
    assert abs(new.expires_at - datetime.now(UTC) - timedelta(days=10)) < timedelta(minutes=1)
    assert old.expires_at == rotated.old_expires_at
    assert rotated.key.startswith("axp_test_")
    again = store.rotate_key(made.key_id, timedelta(days=30))
    assert again.old_expires_at == rotated.old_expires_at  # a grace never lengthens a life


def test_every_change_raises_the_generation(store: Store) -> None:
    seen = [store.generation()]
    made = store.create_key("acme")
    seen.append(store.generation())
    store.rotate_key(made.key_id, timedelta(hours=1))
    seen.append(store.generation())
    store.revoke_key(made.key_id)
    seen.append(store.generation())
    store.update_workspace("acme", plan="free")
    seen.append(store.generation())
    store.delete_workspace("acme")
    seen.append(store.generation())
    assert seen == sorted(set(seen))
