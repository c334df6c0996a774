"""`[telemetry]`: what the processes log, and where they send traces."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """`log_level` is debug, info, warning or error; `log_format` text or json.

    `log_prompts` puts what clients send into the access lines. `otlp_endpoint`: where an OpenTelemetry collector takes
    OTLP over gRPC; None: no traces.
    """

    log_level: str
    log_format: str
    log_prompts: bool
    otlp_endpoint: str | None


def read_telemetry(table: Table) -> TelemetryConfig:
    telemetry = TelemetryConfig(
        log_level=table.take("log_level", values.one_of(("debug", "info", "warning", "error")), "info"),
        log_format=table.take("log_format", values.one_of(("text", "json")), "text"),
        log_prompts=table.take("log_prompts", values.boolean, False),
        otlp_endpoint=table.take("otlp_endpoint", _endpoint, None),
    )
    table.end()
    return telemetry


def _endpoint(value: object) -> str | None:
    endpoint = values.text(value)
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise ValueError(f'must be a URL such as "http://127.0.0.1:4317", without secrets, not {value!r}')
    return endpoint
