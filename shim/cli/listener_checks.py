"""`doctor` about the REST listener and what it tells others: its certificate, and where traces go."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from aiexport_edge.proto.config import Config
from aiexport_edge.proto.units import is_loopback
from aiexport_edge.shim.cli.check import OK, PROBLEM, WARNING, Check

SOON = timedelta(days=14)


def certificate(config: Config) -> Iterator[Check]:
    """Of `[tls]`: whether it can be used, and for how long."""
    cert, key = config.tls.cert, config.tls.key
    if cert is None or key is None:
        if not is_loopback(config.shim.host):
            detail = f"none, and {config.shim.host} can be reached: keys travel as they are"
            yield Check("tls", WARNING, detail, "set [tls] cert and key, or put a proxy with TLS in front")
        return
    from cryptography import x509

    from aiexport_edge.shim.tls import Certificate, CertificateError

    try:
        Certificate(cert, key)
        ends = x509.load_pem_x509_certificate(cert.read_bytes()).not_valid_after_utc
    except (CertificateError, OSError, ValueError) as error:
        yield Check("tls", PROBLEM, str(error), "correct [tls] in the configuration, or the files it names")
        return
    left = ends - datetime.now(UTC)
    status = PROBLEM if left < timedelta(0) else WARNING if left < SOON else OK
    detail = f"{cert} {'has ended' if status == PROBLEM else 'is good until'} {ends:%Y-%m-%d}"
    yield Check("tls", status, detail, "" if status == OK else "renew the certificate; no restart is needed")


def traces(config: Config) -> Iterator[Check]:
    """Whether what sends traces is there where they are configured."""
    endpoint = config.telemetry.otlp_endpoint
    if endpoint is None:
        return
    if importlib.util.find_spec("opentelemetry") and importlib.util.find_spec("opentelemetry.exporter.otlp"):
        yield Check("traces", OK, f"to {endpoint}")
    else:
        remedy = "run in the project's folder: pip install '.[otel]'"
        yield Check("traces", PROBLEM, "[telemetry] otlp_endpoint needs OpenTelemetry's packages", remedy)
