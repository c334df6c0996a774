"""OAuth 2.0 client credentials over the wire, as RFC 6749 says: the grant, its refusals, and what ends a token."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.shim_server import HAIKU, SONNET, ShimServer, until

from aiexport_edge.shim.auth.tokens import AUDIENCE, ISSUER, KEPT, LIFETIME, SigningKeys
from aiexport_edge.shim.store import CreatedOAuthClient
from aiexport_edge.shim.store.oauth_rows import OAuthClients
from aiexport_edge.shim.store.schema import signing_keys
from aiexport_edge.shim.store.signing_rows import SigningRows

TOKEN_PATH = "/v2/oauth/token"
GRANT = {"grant_type": "client_credentials"}


@pytest.fixture
def clients(shim: ShimServer) -> OAuthClients:
    return OAuthClients(shim.store.database)


@pytest.fixture
def client(clients: OAuthClients) -> Iterator[CreatedOAuthClient]:
    made = clients.create("acme")
    yield made
    clients.revoke(made.client_id)


def ask(shim: ShimServer, client: CreatedOAuthClient | None = None, **fields: str) -> httpx.Response:
    auth = httpx.BasicAuth(client.client_id, client.client_secret) if client else None
    return httpx.post(shim.base_url + TOKEN_PATH, data={**GRANT, **fields}, auth=auth)


def token(shim: ShimServer, client: CreatedOAuthClient, **fields: str) -> str:
    reply = ask(shim, client, **fields)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["access_token"])


def status(shim: ShimServer, token: str, path: str = "/v2/models") -> int:
    return httpx.get(shim.base_url + path, headers={"Authorization": f"Bearer {token}"}).status_code


# ---------------------------------------------------------------------------------------------------- the grant


def test_the_grant(shim: ShimServer, client: CreatedOAuthClient) -> None:
    by_header = ask(shim, client)
    by_body = ask(shim, client_id=client.client_id, client_secret=client.client_secret)
    for reply in (by_header, by_body):
        assert reply.status_code == 200
        assert list(reply.json()) == ["access_token", "token_type", "expires_in", "scope"]
        assert reply.json() | {"access_token": ""} == {
            "access_token": "",
            "token_type": "Bearer",
            "expires_in": 3600,
            "scope": "messages batch usage",
        }
        assert reply.headers["cache-control"] == "no-store"
        assert reply.headers["pragma"] == "no-cache"
        assert reply.headers["request-id"].startswith("req_")
        headers = {"Authorization": f"Bearer {reply.json()['access_token']}"}
        answered = httpx.post(
            f"{shim.base_url}/v2/messages",
            json={"model": HAIKU, "messages": [{"role": "user", "content": "COUNT 2"}]},
            headers=headers,
        )
        assert answered.status_code == 200


def test_what_a_token_says(shim: ShimServer, client: CreatedOAuthClient) -> None:
    """RFC 9068: the claims, and the type in the header."""
    before = int(time.time())
    made = token(shim, client, scope="usage messages")
    header = jwt.get_unverified_header(made)
    claims = jwt.decode(made, options={"verify_signature": False})
    assert header | {"kid": ""} == {"alg": "EdDSA", "kid": "", "typ": "at+jwt"}
    assert header["kid"].startswith("sig_")
    assert (claims["iss"], claims["aud"], claims["sub"]) == (ISSUER, AUDIENCE, client.client_id)
    assert claims["client_id"] == client.client_id
    assert claims["workspace"] == shim.store.get_workspace("acme").id
    assert claims["scope"] == "usage messages"
    assert claims["exp"] - claims["iat"] == 3600
    assert before <= claims["iat"] <= time.time()
    assert claims["jti"] != jwt.decode(token(shim, client), options={"verify_signature": False})["jti"]


def test_scopes(shim: ShimServer, client: CreatedOAuthClient) -> None:
    narrow = token(shim, client, scope="batch")
    assert status(shim, narrow) == 403
    assert status(shim, token(shim, client, scope="messages")) == 200
    assert ask(shim, client, scope="messages messages").json()["scope"] == "messages"
    for scope in ("keys", "messages keys", "messages  batch", " messages", "nope", "messages\tbatch"):
        reply = ask(shim, client, scope=scope)
        assert (reply.status_code, reply.json()["error"]) == (400, "invalid_scope"), scope


def form(**fields: str) -> dict[str, Any]:
    return {"data": fields}


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (form(), (400, "invalid_request")),
        (form(grant_type=""), (400, "invalid_request")),
        (form(grant_type="password", username="a", password="b"), (400, "unsupported_grant_type")),
        (form(grant_type="authorization_code", code="x"), (400, "unsupported_grant_type")),
        (form(**GRANT, client_secret="x"), (400, "invalid_request")),
        (form(**GRANT, client_id="client_other"), (400, "invalid_request")),
        ({"content": b"grant_type=client_credentials&grant_type=client_credentials"}, (400, "invalid_request")),
        ({"content": b"grant_type=client_credentials&scope=usage&scope=batch"}, (400, "invalid_request")),
        ({"content": b"\xff\xfe"}, (400, "invalid_request")),
        ({"content": b"&".join(b"a%d=1" % n for n in range(60))}, (400, "invalid_request")),
    ],
)
def test_refusals(
    shim: ShimServer, client: CreatedOAuthClient, request_: dict[str, Any], expected: tuple[int, str]
) -> None:
    auth = httpx.BasicAuth(client.client_id, client.client_secret)
    reply = httpx.post(shim.base_url + TOKEN_PATH, auth=auth, **request_)
    assert (reply.status_code, reply.json()["error"]) == expected
    assert set(reply.json()) == {"error", "error_description"}
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["pragma"] == "no-cache"


def basic(text: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("client_nope:axp_secret_nope"),
        basic("no colon"),
        basic("%66:%C3%A9"),
        {"Authorization": "Basic"},
        {"Authorization": "Basic %%%"},
        {"Authorization": "Basic /////w=="},
        {"Authorization": "Bearer axp_live_" + "x" * 43},
    ],
)
def test_bad_client_credentials(shim: ShimServer, headers: dict[str, str]) -> None:
    reply = httpx.post(shim.base_url + TOKEN_PATH, data=GRANT, headers=headers)
    assert (reply.status_code, reply.json()["error"]) == (401, "invalid_client")
    assert reply.headers["www-authenticate"].startswith("Basic ")
    assert reply.headers["cache-control"] == "no-store"


def test_a_wrong_secret(shim: ShimServer, client: CreatedOAuthClient) -> None:
    for secret in ("", "axp_secret_" + "x" * 43, client.client_secret + "x", "é"):
        reply = ask(shim, client_id=client.client_id, client_secret=secret)
        assert (reply.status_code, reply.json()["error"]) == (401, "invalid_client")


def test_documents_of_another_kind(shim: ShimServer, client: CreatedOAuthClient) -> None:
    auth = httpx.BasicAuth(client.client_id, client.client_secret)
    reply = httpx.post(shim.base_url + TOKEN_PATH, json=GRANT, auth=auth)
    assert (reply.status_code, reply.json()["error"]["type"]) == (415, "invalid_request_error")
    assert httpx.post(shim.base_url + TOKEN_PATH, content=b"x" * (1 << 20), auth=auth).status_code == 413
    assert httpx.get(shim.base_url + TOKEN_PATH, auth=auth).status_code == 405
    text = {"Content-Type": "text/plain;charset=UTF-8"}
    assert (
        httpx.post(
            shim.base_url + TOKEN_PATH, content="&".join("=".join(i) for i in GRANT.items()), auth=auth, headers=text
        ).status_code
        == 200
    )


def test_enterprise_alone(shim: ShimServer, clients: OAuthClients) -> None:
    """A plan counts from the moment it changes, for tokens that are out too."""
    shim.store.create_workspace("planned", "pro")
    made = clients.create("planned")
    reply = ask(shim, made)
    assert (reply.status_code, reply.json()["error"]) == (400, "unauthorized_client")
    shim.store.update_workspace("planned", plan="enterprise")
    bearer = token(shim, made)
    assert status(shim, bearer) == 200
    shim.store.update_workspace("planned", plan="pro")
    until(lambda: status(shim, bearer) == 403, "the plan changes", 60)
    shim.store.update_workspace("planned", plan="enterprise")
    until(lambda: status(shim, bearer, f"/v2/models/{SONNET}") == 200, "the plan changes back", 60)
    shim.store.delete_workspace("planned")
    until(lambda: status(shim, bearer) == 401, "the workspace is gone", 60)
    assert ask(shim, made).json()["error"] == "invalid_client"


# ---------------------------------------------------------------------------------------------------- bad tokens


@pytest.fixture
def forge(shim: ShimServer, client: CreatedOAuthClient) -> Any:
    """Makes tokens with this installation's own signing key, changed in one place."""
    token(shim, client)
    keys = SigningKeys(shim.store.database, shim.services.secrets)
    private_key = keys.open(keys.current())
    genuine = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": client.client_id,
        "client_id": client.client_id,
        "workspace": shim.store.get_workspace("acme").id,
        "scope": "messages",
        "iat": int(time.time()),
        "exp": int(time.time()) + 3600,
        "jti": "x",
    }

    def make(
        headers: dict[str, Any] | None = None, key: Any = private_key, algorithm: str = "EdDSA", **claims: Any
    ) -> str:
        changed = {name: value for name, value in {**genuine, **claims}.items() if value is not None}
        header = {"typ": "at+jwt", "kid": keys.current().key_id, **(headers or {})}
        header = {name: value for name, value in header.items() if value is not None}
        return jwt.encode(changed, key, algorithm, headers=header)

    return make


def test_a_forged_token_is_as_good_as_none(shim: ShimServer, forge: Any) -> None:
    assert status(shim, forge()) == 200
    assert status(shim, forge(iat=int(time.time()) + 30)) == 200  # issued by a machine whose clock is ahead
    other = Ed25519PrivateKey.generate()
    public = other.public_key().public_bytes_raw()
    bad = {
        "unknown audience": forge(aud="another"),
        "unknown issuer": forge(iss="another"),
        "expired": forge(exp=int(time.time()) - 1),
        "not yet": forge(nbf=int(time.time()) + 60),
        "issued by a clock that had jumped": forge(exp=int(time.time()) + 3600 + 600),
        "without an end": forge(exp=None),
        "without an audience": forge(aud=None),
        "without a client": forge(client_id=None),
        "unknown client": forge(client_id="client_nope"),
        "another workspace": forge(workspace="ws_nope"),
        "unknown kid": forge({"kid": "sig_nope"}),
        "no kid": forge({"kid": None}),
        "another type": forge({"typ": "JWT"}),
        "another key": forge(key=other),
        "none": forge(key=None, algorithm="none"),
        "hmac": forge(key=public, algorithm="HS256"),
        "a long header": forge({"x": "y" * 300}),
        "long": forge(x="y" * 3000),
    }
    for name, token_ in bad.items():
        reply = httpx.get(f"{shim.base_url}/v2/models", headers={"Authorization": f"Bearer {token_}"})
        assert reply.status_code == 401, name
        assert reply.json()["error"]["type"] == "authentication_error"
        assert reply.headers["www-authenticate"] == 'Bearer error="invalid_token"'
    assert httpx.get(f"{shim.base_url}/v2/models", headers={"X-API-Key": forge()}).status_code == 401


def test_an_altered_token(shim: ShimServer, client: CreatedOAuthClient) -> None:
    """Also while the genuine one is cached."""
    good = token(shim, client, scope="usage")
    assert status(shim, good) == 403
    head, body, signature = good.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    wider = base64.urlsafe_b64encode(json.dumps({**claims, "scope": "messages"}).encode()).decode().rstrip("=")
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"at+jwt"}').decode().rstrip("=")
    flipped = ("A" if signature[0] != "A" else "B") + signature[1:]
    for bad in (f"{head}.{wider}.{signature}", f"{none}.{wider}.", f"{head}.{body}.{flipped}", f"{head}.{body}."):
        assert status(shim, bad) == 401


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=300))
def test_no_bearer_text_breaks_the_parser(shim: ShimServer, text: str) -> None:
    for credential in (text, f"{text}.{text}.{text}"):
        assert shim.services.tokens.principal(credential) is None


def test_a_token_that_expires_in_the_cache(shim: ShimServer, forge: Any) -> None:
    short = forge(exp=int(time.time()) + 2)
    assert status(shim, short) == 200
    until(lambda: status(shim, short) == 401, "it expires", 60)


def test_with_both_headers_the_key_counts(shim: ShimServer, client: CreatedOAuthClient) -> None:
    bearer = {"Authorization": f"Bearer {token(shim, client)}"}
    for key, expected in (("nope", 401), (shim.key.key, 200)):
        assert httpx.get(f"{shim.base_url}/v2/models", headers={**bearer, "X-API-Key": key}).status_code == expected


# ---------------------------------------------------------------------------------------------------- what ends a token


def test_a_revoked_client(shim: ShimServer, clients: OAuthClients) -> None:
    made = clients.create("acme")
    bearer = token(shim, made)
    assert status(shim, bearer) == 200
    clients.revoke(made.client_id)
    until(lambda: status(shim, bearer) == 401, "the client is revoked", 60)
    assert ask(shim, made).json()["error"] == "invalid_client"


def test_a_rotated_secret(shim: ShimServer, clients: OAuthClients) -> None:
    """Both work for a while; live tokens go on; the third ends the first."""
    made = clients.create("acme")
    bearer = token(shim, made)

    def works(secret: str) -> bool:
        return ask(shim, client_id=made.client_id, client_secret=secret).status_code == 200

    second = clients.rotate_secret(made.client_id, timedelta(hours=1))
    assert works(made.client_secret)
    assert works(second.client_secret)
    third = clients.rotate_secret(made.client_id, timedelta(milliseconds=1500))
    assert not works(made.client_secret)
    until(lambda: not works(second.client_secret), "the second ends", 60)
    assert works(third.client_secret)
    assert status(shim, bearer) == 200


def test_signing_keys_rotate_under_live_tokens(shim: ShimServer, client: CreatedOAuthClient) -> None:
    keys = SigningKeys(shim.store.database, shim.services.secrets)
    old = token(shim, client)
    made = keys.rotate()
    new = token(shim, client)
    assert jwt.get_unverified_header(new)["kid"] == made.key_id != jwt.get_unverified_header(old)["kid"]
    assert status(shim, old) == status(shim, new) == 200
    keys.drop_retired()
    until(lambda: status(shim, old) == 401, "what the old key has signed ends", 60)
    assert status(shim, new) == 200


def test_signing_keys_are_replaced_in_time_and_dropped_when_no_token_is_alive(shim: ShimServer) -> None:
    """A month later the next token makes a new key; the old one goes once its last token must have expired."""
    keys = SigningKeys(shim.store.database, shim.services.secrets)
    first = keys.current()
    assert keys.current() == first

    def age(key_id: str, column: str, by: timedelta) -> None:
        changed = signing_keys.c[column] - by // timedelta(milliseconds=1)
        with shim.store.database.begin() as connection:
            connection.execute(signing_keys.update().where(signing_keys.c.id == key_id).values({column: changed}))

    age(first.key_id, "created_at", timedelta(days=31))
    second = keys.current()
    assert second.key_id != first.key_id
    listed = {key.key_id: key for key in keys.list()}
    assert listed[second.key_id].verifies_until is None
    retired = listed[first.key_id]
    assert retired.retired_at is not None
    assert retired.verifies_until == retired.retired_at + KEPT
    assert KEPT > LIFETIME
    age(first.key_id, "retired_at", KEPT)
    assert first.key_id not in [key.key_id for key in keys.list()]
    third = keys.rotate()
    with shim.store.database.connect() as connection:
        left = set(connection.execute(signing_keys.select()).scalars())
    assert first.key_id not in left
    assert {second.key_id, third.key_id} <= left


def test_of_two_that_find_the_key_old_one_makes_the_new(shim: ShimServer) -> None:
    rows = SigningRows(shim.store.database, KEPT)
    made: list[int] = []

    def make() -> tuple[bytes, bytes]:
        made.append(1)
        return b"p" * 32, b"s"

    first = rows.rotate(make, unless_newer_than=None)
    again = rows.rotate(make, unless_newer_than=timedelta(days=30))
    assert (first.key_id, len(made)) == (again.key_id, 1)
    SigningKeys(shim.store.database, shim.services.secrets).rotate()
    rows.drop_retired()


def test_secrets_are_stored_as_hashes_and_private_keys_sealed(shim: ShimServer, client: CreatedOAuthClient) -> None:
    token(shim, client)
    keys = SigningKeys(shim.store.database, shim.services.secrets)
    private = keys.open(keys.current()).private_bytes_raw()
    for file in shim.config.state.glob("store.db*"):
        held = file.read_bytes()
        assert client.client_secret.encode() not in held
        assert private not in held


def test_without_the_master_key_tokens_live_on_and_none_is_made(
    shim: ShimServer, client: CreatedOAuthClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A lost master key is a 503 that the log explains; nothing quietly makes another in its place."""
    bearer = token(shim, client)
    SigningKeys(shim.store.database, shim.services.secrets).rotate()  # so that no process holds the open key
    file = shim.config.state / "master.key"
    held = file.read_bytes()
    file.unlink()
    try:
        reply = ask(shim, client)
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "overloaded_error")
        assert "master key" in caplog.text
        assert not file.exists()
        assert status(shim, bearer) == 200
    finally:
        file.write_bytes(held)
        file.chmod(0o600)
    assert ask(shim, client).status_code == 200
