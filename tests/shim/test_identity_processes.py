"""What identity promises over several shim processes: no rotation fails a request, no change takes a second to count,
and no secret is in any log."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.certificates import write_certificate
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, SONNET, until
from support.shim_workers import Worker, Workers

from aiexport_edge.shim.auth.authenticator import POLL_S, TRUST_S
from aiexport_edge.shim.auth.operator import hash_password
from aiexport_edge.shim.auth.tokens import SigningKeys
from aiexport_edge.shim.secrets import MasterKeys, SecretBox
from aiexport_edge.shim.store.keys import SCOPES
from aiexport_edge.shim.store.oauth_rows import OAuthClients
from aiexport_edge.shim.store.operator_rows import OperatorLogin

NUM_IN_FLIGHT = 200
WITHIN_S = 1.0  # the promise


@pytest.fixture
def make_workers(tmp_path: Path, make_engine: Callable[..., ScriptedEngine]) -> Iterator[Callable[..., Workers]]:
    made: list[Workers] = []

    def make(**settings: Any) -> Workers:
        made.append(Workers(tmp_path / "state", make_engine(), **settings))
        return made[-1]

    yield make
    for workers in made:
        workers.close()


def two(workers: Workers) -> tuple[Worker, Worker]:
    pair = workers.start_apart(), workers.start_apart()
    for worker in pair:
        workers.wait_ready(worker.base_url)
    return pair


def cli(workers: Workers, *words: str) -> Any:
    command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", *words, "--json"]
    places = ["--config", str(workers.config), "--state", str(workers.state)]
    done = subprocess.run([*command, *places], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def token(base_url: str, client_id: str, secret: str) -> str:
    form = {"grant_type": "client_credentials"}
    reply = httpx.post(f"{base_url}/v2/oauth/token", data=form, auth=(client_id, secret), timeout=60)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["access_token"])


def message(text: str) -> dict[str, Any]:
    return {"model": HAIKU, "messages": [{"role": "user", "content": text}]}


def test_rotation_under_requests_in_flight_fails_none(make_workers: Callable[..., Workers]) -> None:
    """200 streams run over two processes with a key and with tokens while the key, the client's secret and the signing
    key are rotated from outside; they end well, and so does what starts in between with old and new."""
    workers = make_workers()
    workers.start(), workers.start()
    workers.wait_ready()
    made = cli(workers, "keys", "create", "--workspace", "acme")
    client = cli(workers, "oauth-clients", "create", "--workspace", "acme")
    old_token = token(workers.base_url, client["client_id"], client["client_secret"])
    credentials = [{"X-API-Key": made["key"]}, {"Authorization": f"Bearer {old_token}"}]

    async def ask(session: httpx.AsyncClient, number: int) -> str:
        headers = credentials[number % len(credentials)]
        reply = await session.post("/v2/messages/stream", json=message("COUNT 3"), headers=headers)
        assert reply.status_code == 200, reply.text
        return reply.text.rpartition("event: ")[2].partition("\n")[0]

    def rotate() -> None:
        new_key = cli(workers, "keys", "rotate", made["key_id"], "--grace", "1h")
        secret = cli(workers, "oauth-clients", "rotate-secret", client["client_id"], "--grace", "1h")
        cli(workers, "signing-keys", "rotate")
        for each in (client["client_secret"], secret["client_secret"]):
            new_token = token(workers.base_url, client["client_id"], each)
            credentials.append({"Authorization": f"Bearer {new_token}"})
        credentials.append({"Authorization": f"Bearer {new_key['key']}"})

    def until_all_are_in_flight() -> None:
        workers.engine.wait_for(lambda seen: len(seen.submitted) >= NUM_IN_FLIGHT, "all are in flight", 60)

    async def run() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=workers.base_url, timeout=120, limits=limits) as session:
            first = [asyncio.create_task(ask(session, number)) for number in range(NUM_IN_FLIGHT)]
            await asyncio.to_thread(until_all_are_in_flight)
            await asyncio.to_thread(rotate)
            second = [asyncio.create_task(ask(session, number)) for number in range(50)]
            workers.engine.free_run()
            workers.engine.permit(NUM_IN_FLIGHT * 4)
            return list(await asyncio.gather(*first, *second))

    workers.engine.pause()
    assert asyncio.run(run()) == ["message_stop"] * (NUM_IN_FLIGHT + 50)
    until(lambda: workers.statuses() == ["completed"] * (NUM_IN_FLIGHT + 50), "all are accounted", 60)


def test_changes_count_within_a_second_in_every_process(make_workers: Callable[..., Workers]) -> None:
    """What a process has cached counts for less than a second after the store was last asked: so this is no matter of
    how fast the machine is."""
    assert POLL_S < TRUST_S < WITHIN_S
    workers = make_workers()
    pair = two(workers)
    store, clients = workers.store, OAuthClients(workers.store.database)
    for name in ("planned", "doomed"):
        store.create_workspace(name, "enterprise")
    key, client = store.create_key("acme"), clients.create("acme")
    of_planned, of_doomed = clients.create("planned"), clients.create("doomed")
    planned_key = store.create_key("planned")

    def bearer(made: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {token(pair[0].base_url, made.client_id, made.client_secret)}"}

    asked = {
        "key": ({"X-API-Key": key.key}, "/v2/models"),
        "revoked client": (bearer(client), "/v2/models"),
        "token of a changed plan": (bearer(of_planned), "/v2/models"),
        "key of a changed plan": ({"X-API-Key": planned_key.key}, f"/v2/models/{SONNET}"),
        "deleted workspace": (bearer(of_doomed), "/v2/models"),
    }

    def statuses() -> list[dict[str, int]]:
        return [
            {
                name: httpx.get(worker.base_url + path, headers=headers, timeout=60).status_code
                for name, (headers, path) in asked.items()
            }
            for worker in pair
        ]

    for _ in range(2):  # the second time from the cache
        assert statuses() == [dict.fromkeys(asked, 200)] * 2
    store.revoke_key(key.key_id)
    clients.revoke(client.client_id)
    store.update_workspace("planned", plan="free")
    store.delete_workspace("doomed")
    time.sleep(WITHIN_S)
    changed = {
        "key": 401,
        "revoked client": 401,
        "token of a changed plan": 403,
        "key of a changed plan": 404,
        "deleted workspace": 401,
    }
    assert statuses() == [changed] * 2


def test_a_process_that_slept_through_a_change(make_workers: Callable[..., Workers]) -> None:
    """Nothing that was cached before counts when it wakes, though it has polled nothing yet."""
    workers = make_workers()
    worker = workers.start_apart()
    workers.wait_ready(worker.base_url)
    made = workers.store.create_key("acme")
    headers = {"X-API-Key": made.key}
    assert httpx.get(f"{worker.base_url}/v2/models", headers=headers).status_code == 200
    worker.process.send_signal(signal.SIGSTOP)
    workers.store.revoke_key(made.key_id)
    time.sleep(WITHIN_S)
    worker.process.send_signal(signal.SIGCONT)
    assert httpx.get(f"{worker.base_url}/v2/models", headers=headers, timeout=60).status_code == 401


def test_a_token_of_one_process_is_known_to_the_other_at_once(make_workers: Callable[..., Workers]) -> None:
    """Also when it is signed with a key that was made a moment ago."""
    workers = make_workers()
    first, second = two(workers)
    made = OAuthClients(workers.store.database).create("acme")
    keys = SigningKeys(workers.store.database, SecretBox(MasterKeys(workers.state)))
    for _ in range(5):
        keys.rotate()
        headers = {"Authorization": f"Bearer {token(first.base_url, made.client_id, made.client_secret)}"}
        assert httpx.get(f"{second.base_url}/v2/models", headers=headers, timeout=60).status_code == 200


def test_no_secret_is_in_any_log(make_workers: Callable[..., Workers]) -> None:
    """A run in which every kind of secret is used rightly and wrongly, at the level that logs most."""
    workers = make_workers(log_level="debug")
    pair = two(workers)
    rest, admin = pair[0].base_url, workers.admin_url
    logged: list[str] = []
    secrets: dict[str, str] = {"key": workers.key}

    def run(*words: str, stdin: str = "") -> Any:
        command = [sys.executable, "-m", "aiexport_edge.shim.cli.main", *words, "--json"]
        places = ["--config", str(workers.config), "--state", str(workers.state)]
        done = subprocess.run([*command, *places], capture_output=True, text=True, timeout=60, check=False, input=stdin)
        logged.append(done.stderr)
        return json.loads(done.stdout)

    password = secrets["password"] = "the operator's own words"
    run("operator", "password", stdin=password + "\n")
    made = run("keys", "create", "--workspace", "acme", *(word for scope in SCOPES for word in ("--scope", scope)))
    secrets["second key"] = made["key"]
    secrets["rotated key"] = run("keys", "rotate", made["key_id"])["key"]
    client = run("oauth-clients", "create", "--workspace", "acme")
    secrets["client secret"] = client["client_secret"]
    secrets["rotated secret"] = run("oauth-clients", "rotate-secret", client["client_id"])["client_secret"]
    secrets["access token"] = token(rest, client["client_id"], client["client_secret"])
    secrets["prompt"] = "what nobody but the model may read"
    run("signing-keys", "rotate")
    run("master-key", "rotate")
    text = (workers.state / "master.key").read_text()
    secrets.update({f"master key {n}": line for n, line in enumerate(text.splitlines()) if not line.startswith("#")})

    with httpx.Client(timeout=60) as http:
        for worker in pair:
            for credential in (secrets["key"], secrets["second key"], secrets["access token"]):
                for headers in ({"X-API-Key": credential}, {"Authorization": f"Bearer {credential}"}):
                    http.post(f"{worker.base_url}/v2/messages", json=message(secrets["prompt"]), headers=headers)
                    http.post(f"{worker.base_url}/v2/messages", content=secrets["prompt"], headers=headers)
                    http.get(f"{worker.base_url}/v2/models", headers={**headers, "X-Other": secrets["prompt"]})
                http.get(f"{worker.base_url}/v2/models/{credential}?key={credential}")
                http.post(f"{worker.base_url}/v2/keys/{credential}/rotate", headers={"X-API-Key": made["key"]})
                http.get(f"{worker.base_url}/{credential.replace('_', '%5F')}")
                http.get(f"{worker.base_url}/v2/models", headers={"Authorization": f"Basic {credential}"})
        shown = http.post(f"{rest}/v2/keys", headers={"X-API-Key": made["key"]}).json()
        secrets["key made by a program"] = shown["key"]
        secret = secrets["client secret"]
        http.post(f"{rest}/v2/oauth/token", data={"client_id": client["client_id"], "client_secret": secret + "x"})
        http.post(f"{rest}/v2/oauth/token?client_secret={secret}", auth=("nobody", secret))
        assert http.get(f"{admin}/metrics", auth=("operator", password)).status_code == 200
        assert http.get(f"{admin}/metrics", auth=(password, password + "x")).status_code == 401
        http.get(f"{admin}/metrics?password=x", auth=("operator", "x" + password))
    workers.stop()
    logged += [line for worker in pair for line in worker.lines]
    everything = "".join(logged)
    assert everything.count("/v2/messages 200") == 10
    assert "a login on the admin listener failed" in everything
    for name, secret in secrets.items():
        for prefix in ("axp_live_", "axp_secret_"):
            secret = secret.removeprefix(prefix)
        assert secret not in everything, name
    signature = secrets["access token"].rpartition(".")[2]
    assert signature not in everything
    assert os.listdir(workers.state)  # and nothing writes another log
    assert not [file for file in workers.state.rglob("*") if "log" in file.name]


@pytest.mark.parametrize("plain", [False, True])
def test_an_admin_listener_that_others_reach(tmp_path: Path, make_workers: Callable[..., Workers], plain: bool) -> None:
    """Encrypted unless a proxy does that, closed without a password, open with it."""
    cert, key = write_certificate(tmp_path, "127.0.0.1")
    tls = f'[tls]\ncert = "{cert}"\nkey = "{key}"\n'
    told = f'[admin]\nlisten = "0.0.0.0:8401"\nplain_http = {str(plain).lower()}\n'
    workers = make_workers(config=told + ("" if plain else tls), admin_host="0.0.0.0")
    worker = workers.start_apart()
    context = ssl.create_default_context(cafile=str(cert))
    scheme = "http" if plain else "https"
    rest = worker.base_url.replace("http", scheme)
    admin = f"{scheme}://127.0.0.1:{workers.admin_url.rpartition(':')[2]}"
    with httpx.Client(verify=context, timeout=60) as client:
        until(lambda: client.get(f"{rest}/readyz").status_code == 200, "the worker is ready")
        refused = client.get(f"{admin}/console")
        assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
        assert client.get(f"{admin}/healthz").status_code == 200
        OperatorLogin(workers.store.database).set(hash_password("a long password"))
        assert client.get(f"{admin}/console").status_code == 401
        for host in ("edge.example", "127.0.0.1"):
            found = client.get(f"{admin}/console", auth=("operator", "a long password"), headers={"Host": host})
            assert found.status_code == 200
        OperatorLogin(workers.store.database).remove()
        assert client.get(f"{admin}/console", auth=("operator", "a long password")).status_code == 403
    if not plain:
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://127.0.0.1:{admin.rpartition(':')[2]}/healthz", timeout=60)


@pytest.mark.prove
def test_rotations_one_after_another_under_load(make_workers: Callable[..., Workers]) -> None:
    """200 programs at work all the time over two processes, half with keys, half with OAuth, while the key, the secret
    and the signing key are rotated 25 times: they change over as they learn of it, and no request fails."""
    workers = make_workers()
    workers.start(), workers.start()
    workers.wait_ready()
    store, clients = workers.store, OAuthClients(workers.store.database)
    signing = SigningKeys(store.database, SecretBox(MasterKeys(workers.state)))
    key, client = store.create_key("acme"), clients.create("acme")
    key_id, secret = key.key_id, client.client_secret
    current = {
        "key": {"X-API-Key": key.key},
        "token": {"Authorization": f"Bearer {token(workers.base_url, client.client_id, secret)}"},
    }
    statuses: list[int] = []
    done = asyncio.Event()

    def rotate() -> None:
        nonlocal key_id, secret
        rotated = store.rotate_key(key_id, timedelta(minutes=10))
        key_id = rotated.key_id
        secret = clients.rotate_secret(client.client_id, timedelta(minutes=10)).client_secret
        signing.rotate()
        current["key"] = {"X-API-Key": rotated.key}
        current["token"] = {"Authorization": f"Bearer {token(workers.base_url, client.client_id, secret)}"}

    async def program(session: httpx.AsyncClient, kind: str) -> None:
        while not done.is_set():
            reply = await session.post("/v2/messages", json=message("COUNT 2"), headers=current[kind])
            statuses.append(reply.status_code)

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=workers.base_url, timeout=120, limits=limits) as session:
            programs = [
                asyncio.create_task(program(session, kind))
                for kind in ("key", "token")
                for _ in range(NUM_IN_FLIGHT // 2)
            ]
            for _ in range(25):
                before = len(statuses)
                await asyncio.to_thread(rotate)
                while len(statuses) < before + NUM_IN_FLIGHT:  # noqa: ASYNC110 - each has asked again
                    await asyncio.sleep(0.01)
            done.set()
            await asyncio.gather(*programs)

    asyncio.run(run())
    assert set(statuses) == {200}
    print(f"{len(statuses)} requests through 25 rotations")
