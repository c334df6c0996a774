"""The operator's console: what it shows, to whom, and that nothing of a client's making is more than text there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta

import httpx
import pytest
from support.scripted_engine import ScriptedEngine
from support.shim_server import HAIKU, ShimServer, until

from aiexport_edge.shim.auth import operator
from aiexport_edge.shim.auth.operator import hash_password
from aiexport_edge.shim.store import Missing, Store, open_store
from aiexport_edge.shim.store.database import write
from aiexport_edge.shim.store.oauth_rows import OAuthClients
from aiexport_edge.shim.store.operator_rows import OperatorLogin
from aiexport_edge.shim.store.overview import Amount, Overview
from aiexport_edge.shim.store.usage_rows import UsageRows, record
from aiexport_edge.shim.store.values import UsageRow


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells, as text, of the table after a heading."""
    table = page.partition(f"<h2>{heading}</h2>")[2].partition("</table>")[0].partition("<tbody>")[2]
    return [re.findall(r"<td>(.*?)</td>", re.sub(r"</?(?:a|b)\b[^>]*>", "", row)) for row in table.split("</tr>")[:-1]]


def test_what_the_console_shows(
    make_engine: Callable[..., ScriptedEngine], make_shim: Callable[..., ShimServer]
) -> None:
    engine = make_engine()
    engine.load = (1, 2)
    shim = make_shim(engine)
    shim.store.create_workspace("quiet", "free")
    ended = shim.store.create_key("acme", expires_in=timedelta(days=3))
    shim.store.revoke_key(shim.store.create_key("acme").key_id)
    client = OAuthClients(shim.store.database).create("acme", scopes=["usage"])
    with shim.client() as http:
        body = {"model": HAIKU, "messages": [{"role": "user", "content": "COUNT 5"}]}
        assert http.post("/v2/messages", json=body).status_code == 200
    with httpx.Client(base_url=shim.admin_url) as admin:

        def acme() -> list[str]:
            (found,) = (row for row in rows_of(admin.get("/console").text, "Workspaces") if row[0] == "acme")
            return found

        until(lambda: acme()[4] != "0", "the usage is there", 60)
        index = admin.get("/console")
        assert index.headers["content-type"].startswith("text/html")
        assert index.headers["cache-control"] == "no-store"
        assert acme()[:6] == ["acme", "enterprise", "0", "1", "11", "no limit"]
        assert acme()[8:] == ["2", "1", "0", "0"]
        quiet = next(row for row in rows_of(index.text, "Workspaces") if row[0] == "quiet")
        assert quiet[1:6] == ["free", "0", "0", "0", "0%"]
        (engine_row,) = rows_of(index.text, "Engines")
        assert engine_row[1:5] == ["connected", "1", "2", "4 of 10 (40%)"]
        assert engine_row[8] == "2 h 0 min"
        assert ["ready", "1", "0", "100", "25%", "0", ""] in [row[2:] for row in rows_of(index.text, "Models")]

        page = admin.get("/console/acme").text
        keys = {row[0]: row[1:] for row in rows_of(page, "Keys")}
        used = keys[shim.key.key_id]
        assert (used[0], used[3], used[4], used[5]) == ("live", "never", datetime.now(UTC).date().isoformat(), "1")
        assert (keys[ended.key_id][0], keys[ended.key_id][4]) == ("ends soon", "not in 30 days")
        assert "revoked" in [row[0] for row in keys.values()]
        assert [row[:3] for row in rows_of(page, "OAuth clients")] == [[client.client_id, "live", "usage"]]
        for secret in (shim.key.key, ended.key, client.client_secret):
            assert secret not in page + index.text
        assert admin.get("/console/nobody").status_code == 404
        assert httpx.get(f"{shim.base_url}/console").status_code == 404
        engine.kill()
        until(lambda: "not connected" in admin.get("/console").text, "the engine is gone", 60)
        assert rows_of(admin.get("/console").text, "Models")[0][2] == "unavailable"


def test_it_is_behind_the_login(shim: ShimServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_LOG_N", 8)
    login = OperatorLogin(shim.store.database)
    login.set(hash_password("a long password"))
    try:
        for path in ("/console", "/console/acme"):
            assert httpx.get(shim.admin_url + path).status_code == 401
            assert httpx.get(shim.admin_url + path, auth=("operator", "a long password")).status_code == 200
    finally:
        login.remove()


def test_nothing_is_fetched_and_nothing_runs(shim: ShimServer) -> None:
    reply = httpx.get(f"{shim.admin_url}/console")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert not re.findall(r"<script|<link|<img|src=|https?://", reply.text)
    for path in ("/console/<b>x</b>", "/console/%3Cscript%3E", "/console/' OR 1=1", "/console/a%00b"):
        assert httpx.get(shim.admin_url + path).status_code == 404


# ---------------------------------------------------------------------------------------------------- the store's side


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    made = open_store(store_url)
    yield made
    made.close()


def test_overview(store: Store) -> None:
    """In each kind of database; sums of a day and a month; a deleted workspace is not there."""
    for name, plan in (("acme", "pro"), ("gone", "pro"), ("idle", "free")):
        store.create_workspace(name, plan)
    ids = {each.name: each.id for each in store.list_workspaces()}
    key = store.create_key("acme")
    store.create_key("gone")
    rows, now = UsageRows(store.database, "proc_1"), datetime.now(UTC)

    def row(number: int, age: timedelta, status: str = "completed") -> UsageRow:
        return UsageRow(
            request_id=f"req_{number}",
            message_id=f"msg_{number}",
            workspace_id=ids["acme"],
            key_id=key.key_id,
            model=HAIKU,
            status=status,
            input_tokens=10,
            cache_read_input_tokens=5,
            output_tokens=3,
            created_at=now - age,
            ended_at=None if status == "running" else now,
            cost=2_500_000_000_000,
        )

    rows.save([row(10, timedelta(), "running")], [])
    with write(store.database) as connection:
        record(
            connection, [row(number, timedelta(days=days)) for number, days in enumerate((0, 0, 3, 20, 40))], "proc_1"
        )
    store.delete_workspace("gone")
    overview = Overview(store.database)
    acme, idle = overview.workspaces()
    assert (acme.name, idle.name) == ("acme", "idle")
    assert (acme.num_keys, acme.num_clients, acme.num_running, acme.num_open_batches) == (1, 0, 1, 0)
    assert idle.today == idle.month == Amount()
    assert acme.month == Amount(requests=4, tokens=72, cost=10.0)
    found, keys = overview.workspace("acme")
    assert found == acme
    assert [(each.key.key_id, each.month) for each in keys] == [(key.key_id, acme.month)]
    assert keys[0].last_used in (date.today(), now.date())
    for name in ("gone", "nobody"):
        with pytest.raises(Missing):
            overview.workspace(name)
