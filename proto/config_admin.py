"""`[admin]`: where the operator's listener is, for metrics and the console."""

from __future__ import annotations

from dataclasses import dataclass

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.config_tls import TlsConfig
from aiexport_edge.proto.units import is_loopback, split_address


@dataclass(frozen=True, slots=True)
class AdminConfig:
    """`listen` is HOST:PORT, or "" for the REST port + 1 on loopback (`Config.admin_listen` resolves it).

    Beyond loopback the listener uses the certificate of `[tls]`; `plain_http` is for one that stands behind a proxy
    which encrypts.
    """

    listen: str
    plain_http: bool


def read_admin(table: Table, tls: TlsConfig) -> AdminConfig:
    admin = AdminConfig(
        listen=table.take("listen", values.text, ""),
        plain_http=table.take("plain_http", values.boolean, False),
    )
    table.end()
    try:
        host, _ = split_address(admin.listen or "127.0.0.1:1")
    except ValueError as problem:
        raise table.error("listen", str(problem)) from None
    if not is_loopback(host) and tls.cert is None and not admin.plain_http:
        raise table.error(
            "listen",
            f"{host} can be reached from other machines, and the login would travel unencrypted; set [tls] cert and "
            "key, or admin.plain_http = true where a proxy encrypts, or use 127.0.0.1",
        )
    return admin
