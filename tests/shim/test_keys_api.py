"""`/v2/keys` over the wire: what a program may do with its workspace's keys, and with nobody else's."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from support.shim_server import ShimServer, until

from aiexport_edge.shim.store import key_rows
from aiexport_edge.shim.store.keys import SCOPES
from aiexport_edge.shim.store.oauth_rows import OAuthClients


@pytest.fixture
def workspace(shim: ShimServer) -> Iterator[str]:
    """A workspace with no keys."""
    name = "w" + uuid4().hex[:12]
    shim.store.create_workspace(name, "enterprise")
    yield name
    shim.store.delete_workspace(name)


@pytest.fixture
def client(shim: ShimServer, workspace: str) -> Iterator[httpx.Client]:
    with shim.client(shim.store.create_key(workspace, scopes=SCOPES).key) as client:
        yield client


def error(reply: httpx.Response) -> tuple[int, str, str | None]:
    detail = reply.json()["error"]
    return reply.status_code, detail["type"], detail.get("param")


def works(shim: ShimServer, key: str) -> bool:
    return httpx.get(f"{shim.base_url}/v2/models", headers={"X-API-Key": key}).status_code == 200


def test_life_of_a_key(shim: ShimServer, client: httpx.Client) -> None:
    reply = client.post("/v2/keys", json={})
    assert reply.status_code == 201
    assert reply.headers["cache-control"] == "no-store"
    made = reply.json()
    assert list(made) == ["id", "type", "key", "scopes", "test", "created_at", "expires_at"]
    assert made["id"].startswith("key_")
    assert made["key"].startswith("axp_live_")
    assert (made["type"], made["test"], made["expires_at"]) == ("api_key", False, None)
    assert made["scopes"] == ["messages", "batch", "usage"]
    assert works(shim, made["key"])

    listed = client.get("/v2/keys").json()
    assert set(listed) == {"data", "first_id", "last_id", "has_more"}
    assert listed["data"][0] == {name: value for name, value in made.items() if name != "key"}
    assert (listed["first_id"], listed["has_more"], len(listed["data"])) == (made["id"], False, 2)

    rotated = client.post(f"/v2/keys/{made['id']}/rotate", json={"grace_seconds": 3600})
    assert rotated.status_code == 201
    middle = rotated.json()
    assert list(middle) == [*made, "old_key_id", "old_expires_at"]
    assert (middle["old_key_id"], middle["scopes"]) == (made["id"], made["scopes"])
    assert works(shim, made["key"])
    assert works(shim, middle["key"])
    new = client.post(f"/v2/keys/{middle['id']}/rotate", json={"grace_seconds": 1}).json()
    until(lambda: not works(shim, middle["key"]), "the grace is over")
    assert works(shim, new["key"])

    deleted = client.delete(f"/v2/keys/{new['id']}")
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert not works(shim, new["key"]), "what this very process has ended, it takes no more"
    assert new["id"] not in [key["id"] for key in client.get("/v2/keys").json()["data"]]
    assert error(client.delete(f"/v2/keys/{new['id']}"))[0] == 404
    assert error(client.post(f"/v2/keys/{middle['id']}/rotate"))[0] == 400  # its time is over


def test_rotation_without_a_body_keeps_the_old_key_for_a_day(client: httpx.Client) -> None:
    made = client.post("/v2/keys").json()
    new = client.post(f"/v2/keys/{made['id']}/rotate").json()
    left = datetime.fromisoformat(new["old_expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=23, minutes=59) < left <= timedelta(hours=24)
    assert new["expires_at"] is None
    again = client.post(f"/v2/keys/{made['id']}/rotate", json={"grace_seconds": 0}).json()
    assert again["expires_at"] is None  # the grace of the first rotation is not the key's lifetime


@pytest.mark.parametrize("expires_in", [3600, 3600.0, "1h", "60m"])
def test_expiry(client: httpx.Client, expires_in: Any) -> None:
    made = client.post("/v2/keys", json={"expires_in": expires_in, "scopes": None}).json()
    lifetime = datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])
    assert lifetime == timedelta(hours=1)
    new = client.post(f"/v2/keys/{made['id']}/rotate", json={"grace_seconds": 7200}).json()
    assert new["old_expires_at"] == made["expires_at"]  # grace makes no key live longer
    assert new["expires_at"] >= made["expires_at"]


def test_pages(client: httpx.Client) -> None:
    ids = [client.post("/v2/keys", json={}).json()["id"] for _ in range(4)]
    seen: list[str] = []
    page: dict[str, Any] = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {"after_id": page["last_id"]} if page["last_id"] else {}
        page = client.get("/v2/keys", params={"limit": 2, **after}).json()
        seen += [key["id"] for key in page["data"]]
        assert page["first_id"] == page["data"][0]["id"]
        assert page["last_id"] == page["data"][-1]["id"]
    assert len(seen) == len(set(seen)) == 5
    assert set(ids) < set(seen)
    for params in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}):
        assert error(client.get("/v2/keys", params=params)) == (400, "invalid_request_error", "limit")
    assert error(client.get("/v2/keys", params={"after_id": "key_no"})) == (400, "invalid_request_error", "after_id")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"scopes": "messages"}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["root"]}, "scopes.0"),
        ({"scopes": ["messages", 3]}, "scopes.1"),
        ({"scopes": [None]}, "scopes.0"),
        ({"expires_in": 0}, "expires_in"),
        ({"expires_in": -1}, "expires_in"),
        ({"expires_in": True}, "expires_in"),
        ({"expires_in": 1.5}, "expires_in"),
        ({"expires_in": 10**12}, "expires_in"),
        ({"expires_in": "soon"}, "expires_in"),
        ({"expires_in": "0s"}, "expires_in"),
        ([], None),
        ("x", None),
    ],
)
def test_bad_bodies(client: httpx.Client, body: Any, param: str | None) -> None:
    assert error(client.post("/v2/keys", json=body)) == (400, "invalid_request_error", param)


def test_bad_bodies_of_a_rotation(client: httpx.Client) -> None:
    key_id = client.get("/v2/keys").json()["first_id"]
    wrong: list[Any] = [-1, "1h", True, 1.5, 10**9, [], {}]
    for grace in wrong:
        reply = client.post(f"/v2/keys/{key_id}/rotate", json={"grace_seconds": grace})
        assert error(reply) == (400, "invalid_request_error", "grace_seconds")
    assert client.post("/v2/keys", content=b"{").status_code == 400
    assert client.post("/v2/keys", content=b"{}", headers={"Content-Type": "text/html"}).status_code == 415
    assert client.post("/v2/keys", content=b" " * 100_000).status_code == 413
    assert client.get("/v2/keys").json()["has_more"] is False
    assert len(client.get("/v2/keys").json()["data"]) == 1


def test_the_scope_is_needed(shim: ShimServer, workspace: str) -> None:
    made = shim.store.create_key(workspace)
    with shim.client(made.key) as client:
        for reply in (
            client.get("/v2/keys"),
            client.post("/v2/keys", json={}),
            client.post(f"/v2/keys/{made.key_id}/rotate"),
            client.delete(f"/v2/keys/{made.key_id}"),
        ):
            assert error(reply)[:2] == (403, "permission_error")
    for method, path in (("GET", ""), ("POST", ""), ("POST", "/x/rotate"), ("DELETE", "/x")):
        assert httpx.request(method, f"{shim.base_url}/v2/keys{path}").status_code == 401
    with shim.client(shim.store.create_key(workspace, scopes=["keys"]).key) as client:
        assert client.get("/v2/models").status_code == 403


def test_nobody_gives_what_they_do_not_have(shim: ShimServer, workspace: str) -> None:
    full = shim.store.create_key(workspace, scopes=SCOPES)
    some = shim.store.create_key(workspace, scopes=["keys", "usage"])
    with shim.client(some.key) as client:
        assert client.post("/v2/keys", json={}).json()["scopes"] == ["usage"]
        assert client.post("/v2/keys", json={"scopes": ["usage", "keys"]}).status_code == 201
        refused = client.post("/v2/keys", json={"scopes": ["usage", "messages"]})
        assert error(refused) == (403, "permission_error", "scopes")
        assert error(client.post(f"/v2/keys/{full.key_id}/rotate"))[:2] == (403, "permission_error")
        assert client.post(f"/v2/keys/{some.key_id}/rotate").status_code == 201
    with shim.client(shim.store.create_key(workspace, scopes=["keys"]).key) as client:
        assert error(client.post("/v2/keys", json={})) == (403, "permission_error", "scopes")
        assert client.delete(f"/v2/keys/{full.key_id}").status_code == 204  # to end a key is always possible


def test_a_test_key_makes_test_keys(shim: ShimServer, workspace: str) -> None:
    made = shim.store.create_key(workspace, scopes=SCOPES, test=True)
    with shim.client(made.key) as client:
        new = client.post("/v2/keys", json={}).json()
        assert (new["test"], new["key"][:9]) == (True, "axp_test_")
        assert client.post(f"/v2/keys/{new['id']}/rotate").json()["key"].startswith("axp_test_")


def test_an_access_token_with_the_scope(shim: ShimServer, workspace: str) -> None:
    oauth = OAuthClients(shim.store.database).create(workspace, scopes=["keys", "messages"])
    reply = httpx.post(
        f"{shim.base_url}/v2/oauth/token",
        data={"grant_type": "client_credentials"},
        auth=(oauth.client_id, oauth.client_secret),
    )
    headers = {"Authorization": f"Bearer {reply.json()['access_token']}"}
    made = httpx.post(f"{shim.base_url}/v2/keys", headers=headers, json={})
    assert made.status_code == 201
    assert made.json()["scopes"] == ["messages"]


def test_another_workspaces_key_is_not_there(shim: ShimServer, client: httpx.Client) -> None:
    """By no reply can it be told from one that never was."""
    other = shim.store.create_key("acme")

    def replies(key_id: str) -> list[Any]:
        found = [
            client.post(f"/v2/keys/{key_id}/rotate", json={}),
            client.delete(f"/v2/keys/{key_id}"),
            client.get("/v2/keys", params={"after_id": key_id}),
        ]
        shown = [(reply.status_code, reply.json()["error"]) for reply in found]
        return [(status, str(detail).replace(key_id, "ID")) for status, detail in shown]

    never = "key_" + "0" * 24
    assert replies(other.key_id) == replies(never)
    assert [status for status, _ in replies(never)] == [404, 404, 400]
    assert works(shim, other.key)


def test_a_program_cannot_fill_the_store(
    shim: ShimServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_rows, "MAX_LIVE_KEYS", 3)
    made = [client.post("/v2/keys", json={}) for _ in range(3)]
    assert [reply.status_code for reply in made] == [201, 201, 400]
    assert "delete those not in use" in made[-1].json()["error"]["message"]
    first = made[0].json()["id"]
    assert client.post(f"/v2/keys/{first}/rotate", json={"grace_seconds": 60}).status_code == 400
    assert client.post(f"/v2/keys/{first}/rotate", json={"grace_seconds": 0}).status_code == 201
    assert client.delete(f"/v2/keys/{made[1].json()['id']}").status_code == 204
    assert client.post("/v2/keys", json={}).status_code == 201
