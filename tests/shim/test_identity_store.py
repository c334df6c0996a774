"""Keys, OAuth clients, signing keys and sealed secrets in each kind of database, also when two act at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier

import pytest

from aiexport_edge.shim.auth.tokens import SigningKeys, Tokens
from aiexport_edge.shim.secrets import MasterKeys, SecretBox
from aiexport_edge.shim.store import Missing, NotAllowed, Store, open_store, principals
from aiexport_edge.shim.store.key_rows import KeyRows
from aiexport_edge.shim.store.keys import SCOPES, hash_key
from aiexport_edge.shim.store.oauth_rows import OAuthClients
from aiexport_edge.shim.store.operator_rows import OperatorLogin
from aiexport_edge.shim.store.sealed_rows import count_by_master_key, holds_secrets, reseal


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    made = open_store(store_url)
    made.create_workspace("acme", "enterprise")
    yield made
    made.close()


@pytest.fixture
def box(store: Store, tmp_path: Path) -> SecretBox:
    return SecretBox(MasterKeys(tmp_path / "keys", environ={}, allow_new=lambda: not holds_secrets(store.database)))


def test_keys_of_a_workspace(store: Store) -> None:
    rows, workspace_id = KeyRows(store.database), store.get_workspace("acme").id
    before = store.generation()
    made = [rows.create(workspace_id, ("messages",), expires_in=None, test=False)[1] for _ in range(5)]
    assert store.generation() == before + 5
    first, more = rows.page(workspace_id, 3, None)
    rest, no_more = rows.page(workspace_id, 3, first[-1].key_id)
    assert (len(first), more, len(rest), no_more) == (3, True, 2, False)
    assert {key.key_id for key in first + rest} == {key.key_id for key in made}
    assert first + rest == sorted(made, key=lambda key: (key.created_at, key.key_id), reverse=True)
    old = made[0].key_id
    created, rotated, _ = rows.rotate(workspace_id, old, timedelta(hours=1), within=frozenset(SCOPES))
    assert rotated.old_key_id == old
    with pytest.raises(NotAllowed):
        rows.rotate(workspace_id, old, timedelta(hours=1), within=frozenset({"keys"}))
    principal = principals.of_key(store.database, hash_key(created.key))
    assert principal is not None
    assert (principal.kind, principal.key_id, principal.scopes) == ("key", created.key_id, frozenset({"messages"}))
    rows.revoke(workspace_id, created.key_id)
    assert principals.of_key(store.database, hash_key(created.key)) is None
    with pytest.raises(Missing):
        rows.revoke(workspace_id, created.key_id)
    with pytest.raises(Missing):
        rows.revoke("ws_other", old)


def test_a_client_and_its_tokens(store: Store, box: SecretBox) -> None:
    clients, tokens = OAuthClients(store.database), Tokens(store.database, SigningKeys(store.database, box))
    made = clients.create("acme", scopes=["usage", "batch"])
    assert clients.prove(made.client_id, "nope") is None
    assert clients.prove("client_nope", made.client_secret) is None
    grantee = clients.prove(made.client_id, made.client_secret)
    assert grantee is not None
    token = tokens.issue(grantee, ["batch"])
    principal = tokens.principal(token)
    assert principal is not None
    assert (principal.kind, principal.key_id, principal.workspace) == ("token", made.client_id, "acme")
    assert (principal.scopes, principal.digest) == (frozenset({"batch"}), hash_key(token))
    second = clients.rotate_secret(made.client_id, timedelta(hours=1))
    assert clients.prove(made.client_id, made.client_secret) is not None
    assert clients.prove(made.client_id, second.client_secret) is not None
    store.delete_workspace("acme")
    assert clients.prove(made.client_id, second.client_secret) is None
    assert tokens.principal(token) is None


def test_one_of_many_makes_the_first_signing_key(store: Store, box: SecretBox) -> None:
    keys, start = SigningKeys(store.database, box), Barrier(6)

    def ask() -> str:
        start.wait(30)
        return keys.current().key_id

    with ThreadPoolExecutor(6) as threads:
        made = {future.result() for future in [threads.submit(ask) for _ in range(6)]}
    assert len(made) == 1
    assert len(keys.list()) == 1


def test_rotations_at_once_leave_one_that_signs(store: Store, box: SecretBox) -> None:
    keys, start = SigningKeys(store.database, box), Barrier(4)

    def rotate() -> None:
        start.wait(30)
        keys.rotate()

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(rotate) for _ in range(4)]:
            future.result()
    listed = keys.list()
    assert [key.retired_at is None for key in listed].count(True) == 1
    assert len(listed) == 4


def test_resealing(store: Store, box: SecretBox) -> None:
    assert not holds_secrets(store.database)
    keys = SigningKeys(store.database, box)
    keys.rotate(), keys.rotate()
    assert holds_secrets(store.database)
    first = box.keys.newest().id
    assert count_by_master_key(store.database) == {first: 2}
    second = box.keys.rotate().id
    assert reseal(store.database, box) == (2, 0)
    assert count_by_master_key(store.database) == {second: 2}
    box.keys.keep([second])
    for key in keys.list():
        assert keys.open(key).public_key().public_bytes_raw() == key.public_key
    box.keys.file.unlink()
    box.keys.rotate()
    assert reseal(store.database, box) == (0, 2)


def test_operator_login(store: Store) -> None:
    login = OperatorLogin(store.database)
    assert login.password_hash() is None
    login.set("one")
    login.set("two")
    assert login.password_hash() == "two"
    login.remove()
    assert login.password_hash() is None
