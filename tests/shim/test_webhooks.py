"""Webhooks over real sockets: signed as the published library verifies, tried again, given up, sent to nobody else."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update
from standardwebhooks import Webhook, WebhookVerificationError
from support.shim_server import until
from support.webhook_receiver import receiving, status

from aiexport_edge.proto.config_webhooks import WebhooksConfig
from aiexport_edge.shim.address_policy import AddressPolicy, read_url
from aiexport_edge.shim.outgoing import tls_context
from aiexport_edge.shim.secrets import MasterKeys, SecretBox
from aiexport_edge.shim.store import Missing, Store, open_store
from aiexport_edge.shim.store.database import read, write
from aiexport_edge.shim.store.rows import now_ms
from aiexport_edge.shim.store.schema import webhook_deliveries, webhook_secrets
from aiexport_edge.shim.store.webhook_rows import Delivery, WebhookRows
from aiexport_edge.shim.webhooks import sender as sender_module
from aiexport_edge.shim.webhooks.post import NotDelivered, post
from aiexport_edge.shim.webhooks.sender import DELAYS, WebhookSender, next_try

PAYLOAD = b'{"type":"batch.completed","timestamp":"2026-01-01T00:00:00Z","data":{"id":"batch_1"}}'
HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path / 'store.db'}")
    opened.create_workspace("acme", "pro")
    yield opened
    opened.close()


@pytest.fixture
def rows(store: Store, tmp_path: Path) -> WebhookRows:
    return WebhookRows(store.database, SecretBox(MasterKeys(tmp_path, environ={})))


def record(store: Store, url: str, *, name: str = "evt_1") -> None:
    """A delivery that is due, as the end of a batch records it."""
    now = now_ms()
    with write(store.database) as connection:
        connection.execute(
            insert(webhook_deliveries).values(
                id=name,
                workspace_id=store.get_workspace("acme").id,
                batch_id=f"batch_of_{name}",
                url=url,
                type="batch.completed",
                payload=PAYLOAD,
                state="pending",
                created_at=now,
                next_at=now,
                give_up_at=now + 72 * 3_600_000,
                attempts=0,
            )
        )


@contextmanager
def sending(rows: WebhookRows, *, allow: tuple[str, ...] = ("127.0.0.1",), ca: Path | None = None) -> Iterator[None]:
    """A sender on a loop of its own, until the block is left."""
    config = WebhooksConfig(allow, datetime.timedelta(seconds=20), ca)
    sender = WebhookSender(rows, AddressPolicy(allow), config, retention=datetime.timedelta(days=29))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = asyncio.run_coroutine_threadsafe(sender.run(), loop)
    try:
        yield
    finally:
        running.cancel()

        async def rest() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(rest(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def settled(rows: WebhookRows, name: str = "evt_1") -> Delivery:
    """The delivery once it is no longer pending."""

    def find() -> Delivery:
        return next(delivery for delivery in rows.deliveries() if delivery.id == name)

    until(lambda: find().state != "pending", "the delivery is settled")
    return find()


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without a pause."""
    monkeypatch.setattr(sender_module, "DELAYS", (datetime.timedelta(milliseconds=1),))
    monkeypatch.setattr(sender_module, "_LOOK_S", 0.01)


def test_the_published_library_verifies_every_try(store: Store, rows: WebhookRows, at_once: None) -> None:
    secret = rows.secret("acme")
    with receiving(status(500), status(302, location="http://127.0.0.1:1/"), status(204)) as receiver, sending(rows):
        record(store, receiver.url + "?q=1")
        delivery = settled(rows)
        heard = receiver.wait(3)
    assert (delivery.state, delivery.attempts, delivery.last_status) == ("delivered", 3, 204)
    assert len(heard) == 3
    assert {each.headers["webhook-id"] for each in heard} == {"evt_1"}
    assert {each.path for each in heard} == {"/done?q=1"}
    for each in heard:
        assert each.body == PAYLOAD
        assert each.headers["content-type"] == "application/json"
        assert Webhook(secret).verify(each.body, each.headers)["data"]["id"] == "batch_1"
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(each.body + b" ", each.headers)


def test_a_rotated_secret_signs_beside_the_new_one(store: Store, rows: WebhookRows) -> None:
    old = rows.secret("acme")
    assert rows.secret("acme") == old
    new = rows.secret("acme", rotate=True)
    assert new != old
    assert rows.secret("acme") == new
    with receiving() as receiver, sending(rows):
        record(store, receiver.url)
        (heard,) = receiver.wait(1)
        settled(rows)
    assert len(heard.headers["webhook-signature"].split()) == 2
    for secret in (old, new):
        Webhook(secret).verify(heard.body, heard.headers)
    with write(store.database) as connection:  # a day later
        connection.execute(
            update(webhook_secrets).where(webhook_secrets.c.retires_at.is_not(None)).values(retires_at=1)
        )
    assert rows.signing_secrets(store.get_workspace("acme").id) == [new]
    rows.forget(datetime.timedelta(days=29))
    with read(store.database) as connection:
        assert len(connection.execute(select(webhook_secrets)).all()) == 1


def test_secrets_are_sealed_and_a_workspaces_own(store: Store, rows: WebhookRows) -> None:
    store.create_workspace("other", "pro")
    secret = rows.secret("acme")
    assert secret.startswith("whsec_")
    assert rows.secret("other") != secret
    with read(store.database) as connection:
        for sealed in connection.execute(select(webhook_secrets.c.sealed)).scalars():
            assert secret.removeprefix("whsec_").encode() not in sealed
    with pytest.raises(Missing):
        rows.secret("nobody")


def test_dead_after_72_hours_then_sent_again_on_demand(
    store: Store, rows: WebhookRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "_LOOK_S", 0.01)
    with receiving(status(410), status(204)) as receiver, sending(rows):
        record(store, receiver.url)
        until(lambda: rows.deliveries()[0].last_error is not None, "the first try has failed")
        (delivery,) = rows.deliveries()
        assert (delivery.state, delivery.last_status, delivery.last_error) == ("pending", 410, "answered 410")
        assert rows.deliveries(dead=True) == []
        receiver.answers = [status(503), status(503), status(204)]
        with write(store.database) as connection:  # three days later
            connection.execute(update(webhook_deliveries).values(give_up_at=now_ms(), next_at=now_ms()))
        assert settled(rows).state == "dead"
        (dead,) = rows.deliveries(dead=True)
        assert (dead.attempts, dead.last_status, dead.next_at) == (2, 503, None)
        rows.redeliver("evt_1")
        until(lambda: rows.deliveries()[0].state == "delivered", "it is delivered after all")
        assert {each.headers["webhook-id"] for each in receiver.wait(3)} == {"evt_1"}
    with pytest.raises(Missing):
        rows.redeliver("evt_2")


def test_a_delivery_outlives_its_sender_and_is_tried_by_one_at_a_time(store: Store, rows: WebhookRows) -> None:
    record(store, "http://127.0.0.1:9/")
    (due,) = rows.take_due(10, hold=HOUR)
    assert rows.take_due(10, hold=HOUR) == []  # another process looks
    with write(store.database) as connection:  # the first one has died, and its hold is over
        connection.execute(update(webhook_deliveries).values(next_at=now_ms()))
    with receiving() as receiver:
        with write(store.database) as connection:
            connection.execute(update(webhook_deliveries).values(url=receiver.url))
        with sending(rows):
            assert settled(rows).attempts == 2
    rows.failed(due, None, "too late", None)  # what the first one still says does not count
    assert rows.deliveries()[0].state == "delivered"


def test_a_dead_senders_delivery_is_tried_again_within_a_minute(store: Store, rows: WebhookRows) -> None:
    """It waited for five, whatever time a try is given."""
    held = threading.Event()

    def answer_late(handler: BaseHTTPRequestHandler) -> None:
        held.wait(60)

    with receiving(answer_late) as receiver:
        record(store, receiver.url)
        with sending(rows):
            receiver.wait(1)
            (delivery,) = rows.deliveries()
            latest = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
        held.set()
    assert delivery.next_at is not None
    assert delivery.next_at < latest


def test_a_slow_workspace_holds_up_no_other(store: Store, rows: WebhookRows) -> None:
    record(store, "http://127.0.0.1:9/", name="evt_1")
    record(store, "http://127.0.0.1:9/", name="evt_2")
    acme = store.get_workspace("acme").id
    assert rows.take_due(10, hold=HOUR, busy=[acme]) == []
    assert [due.id for due in rows.take_due(1, hold=HOUR, busy=["ws_other"])] == ["evt_1"]


def test_tries_go_on_for_72_hours() -> None:
    now = start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    give_up_at = start + 72 * HOUR
    tries = [now]
    while (after := next_try(now, len(tries), give_up_at, 0.0)) is not None:
        assert after > now
        tries.append(after)
        now = after
    assert tries[-1] == give_up_at
    assert 12 <= len(tries) <= 25
    assert tries[1] - start == DELAYS[0]
    assert DELAYS[0] * 0.9 <= next_try(start, 1, give_up_at, -1.0) - start <= DELAYS[0]  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------- the connection


def send(
    url: str, *, allow: tuple[str, ...] = ("127.0.0.0/8",), tls: ssl.SSLContext | None = None, seconds: float = 20
) -> int:
    """One POST."""
    return asyncio.run(
        post(read_url(url), [("webhook-id", "x")], PAYLOAD, policy=AddressPolicy(allow), tls=tls, seconds=seconds)
    )


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Every name has these addresses."""

    def getaddrinfo(host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_a_name_is_judged_by_the_address_that_is_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        resolving(monkeypatch, "127.0.0.1")
        with pytest.raises(NotDelivered, match="not one that"):
            send(f"http://hooks.example.com:{receiver.port}/", allow=("public",))
        assert receiver.heard == []
        # of several addresses those that are allowed are tried, in order, and no other
        resolving(monkeypatch, "10.0.0.1", "127.0.0.2", "127.0.0.1")
        assert send(f"http://hooks.example.com:{receiver.port}/", allow=("127.0.0.1",)) == 204
        assert send(f"http://hooks.example.com:{receiver.port}/x", allow=("127.0.0.0/8",)) == 204
        assert [each.headers["host"] for each in receiver.heard] == [f"hooks.example.com:{receiver.port}"] * 2


def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert send(receiver.url) == 204
        assert proxy.heard == []


def endless(handler: BaseHTTPRequestHandler) -> None:
    """A reply whose head never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    try:
        while True:
            handler.wfile.write(b"x: " + b"y" * 1000 + b"\r\n")
    except OSError:
        return


def huge(handler: BaseHTTPRequestHandler) -> None:
    """A 200 with a body that never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    try:
        while True:
            handler.wfile.write(b"z" * 65536)
    except OSError:
        return


def nonsense(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")


def test_of_a_reply_only_the_head_is_read_and_that_within_bounds() -> None:
    with receiving(huge) as receiver:
        assert send(receiver.url) == 200
    for answer in (endless, nonsense, lambda handler: None):
        with receiving(answer) as receiver, pytest.raises(NotDelivered, match="not that of an HTTP server"):
            send(receiver.url)


def test_a_receiver_that_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(NotDelivered, match="no reply within"):
        send(f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=0.05)


@pytest.mark.parametrize("code", [301, 307, 308, 400, 410, 500])
def test_nothing_but_a_2xx_is_heard(code: int) -> None:
    with receiving() as elsewhere:
        with receiving(status(code, location=elsewhere.url)) as receiver, pytest.raises(NotDelivered) as failed:
            send(receiver.url)
        assert failed.value.status == code
        assert len(receiver.heard) == 1
        assert elsewhere.heard == []


def test_nobody_there() -> None:
    with socket.socket() as deaf:  # it has the port and does not listen
        deaf.bind(("127.0.0.1", 0))
        with pytest.raises(NotDelivered, match="no connection"):
            send(f"http://127.0.0.1:{deaf.getsockname()[1]}/")


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[[str], Path]:
    """Makes self-signed certificates with their keys in one PEM file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def make(host: str) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        now = datetime.datetime.now(datetime.UTC)
        try:
            alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            alternative = x509.DNSName(host)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - HOUR)
            .not_valid_after(now + HOUR)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        pem = made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = tmp_path / f"{host.replace(':', '_')}.pem"
        path.write_bytes(pem)
        return path

    return make


def test_tls_is_verified_by_the_name_of_the_url(
    certificate: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = certificate("hooks.example.com")
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(pem)
    names: list[str | None] = []
    served.sni_callback = lambda _socket, name, _context: names.append(name)
    with receiving(tls=served) as receiver:
        resolving(monkeypatch, "127.0.0.1")
        trusting = tls_context(pem)
        assert send(f"https://hooks.example.com:{receiver.port}/", tls=trusting) == 204
        assert names == ["hooks.example.com"]
        for host, tls in (
            ("other.example.com", trusting),
            ("127.0.0.1", trusting),
            ("hooks.example.com", tls_context(None)),
        ):
            with pytest.raises(NotDelivered, match="certificate is not valid"):
                send(f"https://{host}:{receiver.port}/", tls=tls)
    assert len(receiver.heard) == 1


def test_deliveries_over_tls_with_the_operators_authority(
    store: Store, rows: WebhookRows, certificate: Callable[[str], Path]
) -> None:
    pem = certificate("127.0.0.1")
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(pem)
    with receiving(tls=served) as receiver, sending(rows, ca=pem):
        record(store, f"https://127.0.0.1:{receiver.port}/")
        assert settled(rows).state == "delivered"


def test_an_address_that_is_no_longer_allowed_is_not_called(store: Store, rows: WebhookRows, at_once: None) -> None:
    with receiving() as receiver, sending(rows, allow=("public",)):
        record(store, receiver.url)
        until(lambda: (rows.deliveries()[0].last_error or "").startswith("the URL leads to"), "it is refused")
    assert receiver.heard == []


def test_settled_deliveries_are_forgotten(store: Store, rows: WebhookRows) -> None:
    record(store, "http://127.0.0.1:9/", name="evt_1")
    record(store, "http://127.0.0.1:9/", name="evt_2")
    for due in rows.take_due(1, hold=HOUR):
        rows.delivered(due, 200)
    rows.forget(datetime.timedelta(days=1))
    assert len(rows.deliveries()) == 2
    rows.forget(datetime.timedelta(milliseconds=-1000))
    assert [delivery.state for delivery in rows.deliveries()] == ["pending"]
