"""Keys over the wire: which header counts, what ends a key, what a scope and a plan allow, when the body is read."""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from support.shim_server import HAIKU, SONNET, ShimServer, until

from aiexport_edge.shim.store.keys import hash_key

MESSAGE = {"model": HAIKU, "messages": [{"role": "user", "content": "COUNT 2"}]}


def status(shim: ShimServer, headers: dict[str, str]) -> int:
    return httpx.get(f"{shim.base_url}/v2/models", headers=headers).status_code


def test_both_headers(shim: ShimServer) -> None:
    key = shim.key.key
    assert status(shim, {"X-API-Key": key}) == 200
    assert status(shim, {"Authorization": f"Bearer {key}"}) == 200
    assert status(shim, {"Authorization": f"bearer {key}"}) == 200
    assert status(shim, {"X-API-Key": key, "Authorization": "Bearer nope"}) == 200
    assert status(shim, {"X-API-Key": "nope", "Authorization": f"Bearer {key}"}) == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": ""},
        {"X-API-Key": "nope"},
        {"X-API-Key": "axp_live_" + "x" * 43},
        {"X-API-Key": "axp_live_" + "x" * 100_0},
        {"X-API-Key": "é".encode().decode("latin-1")},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"Authorization": "Bearer a.b.c"},
    ],
)
def test_missing_and_bad_credentials(shim: ShimServer, headers: dict[str, str]) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for request in ("GET /v2/models", "GET /v2/models/x", "POST /v2/messages", "POST /v1/messages"):
        method, path = request.split()
        reply = httpx.request(method, shim.base_url + path, headers=encoded)
        assert reply.status_code == 401
        assert reply.json()["error"]["type"] == "authentication_error"
        assert reply.headers["www-authenticate"].partition(" error=")[0] == "Bearer"
        assert reply.json()["request_id"] == reply.headers["request-id"]


def test_a_test_key_works(shim: ShimServer) -> None:
    made = shim.store.create_key("acme", test=True)
    assert made.key.startswith("axp_test_")
    assert status(shim, {"X-API-Key": made.key}) == 200


def test_an_expired_key(shim: ShimServer) -> None:
    """Also one that expires while it is in the cache."""
    made = shim.store.create_key("acme", expires_in=timedelta(milliseconds=700))
    headers = {"X-API-Key": made.key}
    assert status(shim, headers) == 200
    until(lambda: status(shim, headers) == 401, "the key expires", 60)


def test_a_revoked_key(shim: ShimServer) -> None:
    """Within a second, by another connection to the store, as another process has it."""
    made = shim.store.create_key("acme")
    headers = {"X-API-Key": made.key}
    assert status(shim, headers) == 200
    shim.store.revoke_key(made.key_id)
    until(lambda: status(shim, headers) == 401, "the key is revoked", 60)


def test_rotation_fails_no_request(shim: ShimServer) -> None:
    old = shim.store.create_key("acme")
    new = shim.store.rotate_key(old.key_id, timedelta(seconds=2))
    assert status(shim, {"X-API-Key": old.key}) == status(shim, {"X-API-Key": new.key}) == 200
    until(lambda: status(shim, {"X-API-Key": old.key}) == 401, "the old key ends", 60)
    assert status(shim, {"X-API-Key": new.key}) == 200


def test_scopes(shim: ShimServer) -> None:
    made = shim.store.create_key("acme", scopes=["batch", "usage"])
    with shim.client(made.key) as client:
        for reply in (client.get("/v2/models"), client.post("/v2/messages", json=MESSAGE)):
            assert reply.status_code == 403
            assert reply.json()["error"]["type"] == "permission_error"


def test_free_plan_has_haiku_alone(shim: ShimServer) -> None:
    shim.store.create_workspace("frugal", "free")
    with shim.client(shim.store.create_key("frugal").key) as client:
        assert [model["id"] for model in client.get("/v2/models").json()["data"]] == [HAIKU]
        assert client.get(f"/v2/models/{SONNET}").status_code == 404
        assert client.get(f"/v2/models/{HAIKU}").status_code == 200
        reply = client.post("/v2/messages", json={**MESSAGE, "model": SONNET})
        assert reply.status_code == 403
        assert reply.json()["error"] | {"message": ""} == {"type": "permission_error", "message": "", "param": "model"}
        assert client.post("/v2/messages", json=MESSAGE).status_code == 200
        shim.store.update_workspace("frugal", plan="pro")
        until(lambda: client.get(f"/v2/models/{SONNET}").status_code == 200, "the plan changes", 60)
        shim.store.delete_workspace("frugal")
        until(lambda: client.get("/v2/models").status_code == 401, "the workspace is gone", 60)


def test_the_body_is_not_read_before_the_credentials_are_checked(shim: ShimServer) -> None:
    """A client that waits for "100 Continue" is told 401 without having sent a byte of its body."""
    head = "POST /v2/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nExpect: 100-continue\r\nX-API-Key: "
    for key, first_line in (("nope", b"HTTP/1.1 401 Unauthorized"), (shim.key.key, b"HTTP/1.1 100 Continue")):
        with socket.create_connection(shim.address(), timeout=60) as connection:
            connection.sendall(f"{head}{key}\r\n\r\n".encode())
            assert connection.recv(4096).splitlines()[0] == first_line


def test_keys_are_stored_as_hashes(shim: ShimServer) -> None:
    made = shim.store.create_key("acme")
    principal = shim.store.find_principal(hash_key(made.key))
    assert principal is not None
    assert principal.key_id == made.key_id
    database = Path(str(shim.store.database.url.database))
    for file in database.parent.glob(database.name + "*"):
        assert made.key.encode() not in file.read_bytes()
        assert made.key.removeprefix("axp_live_").encode() not in file.read_bytes()


def test_no_secret_in_any_log(shim: ShimServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = "s3cret-prompt"
    with shim.client() as client:
        body = {**MESSAGE, "messages": [{"role": "user", "content": secret}]}
        assert client.post("/v2/messages", json=body).status_code == 200
        assert client.post("/v2/messages?key=" + shim.key.key, content=json.dumps(body)[:-2]).status_code == 400

    def logged() -> str:
        """What the server has said; this test's own client logs too."""
        lines = [repr(vars(record)) for record in caplog.records if not record.name.startswith("http")]
        return "\n".join(lines)

    until(lambda: "POST /v2/messages 400" in logged(), "both are logged", 60)
    assert shim.key.key not in logged()
    assert secret not in logged()
