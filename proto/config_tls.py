"""`[tls]`: the certificate of the REST listener. Without it clients connect unencrypted, or to a proxy that has one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """`cert`: the chain, leaf first, and `key`, both PEM. Both or neither."""

    cert: Path | None
    key: Path | None


def read_tls(table: Table, base: Path) -> TlsConfig:
    tls = TlsConfig(
        cert=table.take("cert", values.path(base), None),
        key=table.take("key", values.path(base), None),
    )
    table.end()
    if (tls.cert is None) != (tls.key is None):
        missing = "key" if tls.key is None else "cert"
        raise table.error(missing, "is missing; cert and key go together")
    return tls
