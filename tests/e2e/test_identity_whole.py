"""OAuth, `/v2/keys`, the console and the operator's login on the whole installation, with the demo model behind it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import anthropic
import httpx
from support.edge import HAIKU, Edge, message, wait_until


def token(edge: Edge, client: dict[str, Any], **fields: str) -> str:
    reply = httpx.post(
        f"{edge.base_url}/v2/oauth/token",
        data={"grant_type": "client_credentials", **fields},
        auth=(client["client_id"], client["client_secret"]),
    )
    assert reply.status_code == 200, reply.text
    return str(reply.json()["access_token"])


def test_a_program_with_oauth(edge: Edge) -> None:
    """From the command line to the official SDK, to the usage that is counted under the client, to the end."""
    client = edge.cli("oauth-clients", "create", "--workspace", "demo")
    bearer = token(edge, client)
    with anthropic.Anthropic(base_url=edge.base_url, api_key=None, auth_token=bearer) as sdk:
        reply = sdk.messages.create(
            model=HAIKU, max_tokens=8, messages=[{"role": "user", "content": "Tell me a story about a fox."}]
        )
    assert reply.usage.output_tokens == 8
    headers = {"Authorization": f"Bearer {bearer}"}
    usage = httpx.get(f"{edge.base_url}/v2/usage", params={"group_by": "key"}, headers=headers).json()
    (mine,) = (row for row in usage["data"] if row["group"] == client["client_id"])
    assert (mine["requests"], mine["output_tokens"]) == (1, 8)
    edge.cli("signing-keys", "rotate")
    for each in (bearer, token(edge, client, scope="messages")):
        shown = httpx.get(f"{edge.base_url}/v2/models", headers={"Authorization": f"Bearer {each}"})
        assert shown.status_code == 200
    edge.cli("oauth-clients", "revoke", client["client_id"])
    wait_until(
        lambda: httpx.get(f"{edge.base_url}/v2/models", headers=headers).status_code == 401, "the client is revoked"
    )


def test_a_program_manages_its_keys(edge: Edge) -> None:
    made = edge.cli("keys", "create", "--workspace", "demo", "--scope", "keys", "--scope", "messages")
    with httpx.Client(base_url=edge.base_url, headers={"X-API-Key": made["key"]}, timeout=60) as client:
        new = client.post("/v2/keys", json={"expires_in": "1h"}).json()
        with httpx.Client(base_url=edge.base_url, headers={"X-API-Key": new["key"]}, timeout=60) as other:
            assert other.post("/v2/messages", json=message("hi", max_tokens=2)).status_code == 200
            assert other.get("/v2/keys").status_code == 403
        listed = {key["key_id"]: key for key in edge.cli("keys", "list", "--workspace", "demo")}
        assert listed[new["id"]]["scopes"] == ["messages"]
        for key_id in (new["id"], made["key_id"]):
            assert client.delete(f"/v2/keys/{key_id}").status_code == 204


def test_the_operators_listener(edge: Edge) -> None:
    """The console shows the real engine; a password set from the command line holds at once."""
    admin = f"http://127.0.0.1:{edge.admin_port}"
    page = httpx.get(f"{admin}/console").text
    assert "connected" in page
    assert "demo" in page
    assert edge.key not in page
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", "operator", "password"]
    subprocess.run(
        [*command, "--state", str(edge.state)], input="a long password\n", capture_output=True, text=True, check=True
    )
    try:
        assert httpx.get(f"{admin}/metrics").status_code == 401
        assert httpx.get(f"{admin}/metrics", auth=("operator", "a long password"), timeout=60).status_code == 200
        assert httpx.get(f"{admin}/healthz").status_code == 200
    finally:
        edge.cli("operator", "password", "--remove")
    assert httpx.get(f"{admin}/metrics").status_code == 200
