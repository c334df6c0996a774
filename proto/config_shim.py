"""`[shim]`: where the REST front listens, what it takes of clients, and which engines it sends work to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.units import parse_duration, parse_size

ROUTINGS = ("prefix", "least-load", "round-robin")


@dataclass(frozen=True, slots=True)
class ShimConfig:
    """`engines` are gRPC addresses (HOST:PORT, unix:PATH, or dns:///HOST:PORT for every address that the name has,
    looked up again every `engine_resolve`); CA, certificate, key and token are for those on other machines. `routing`:
    how one of them is chosen.
    """

    host: str
    port: int
    workers: int
    engines: tuple[str, ...]
    engine_ca: Path | None
    engine_cert: Path | None
    engine_key: Path | None
    engine_token_file: Path | None
    engine_resolve: timedelta
    routing: str
    max_body_bytes: int
    inflight_body_bytes: int
    max_connections: int  # of one worker process
    cors_origins: tuple[str, ...]  # web pages whose scripts may call; none by default
    drain: timedelta  # how long open streams may go on after SIGTERM


def read_shim(table: Table, base: Path) -> ShimConfig:
    nothing: tuple[str, ...] = ()
    shim = ShimConfig(
        host=table.take("host", values.host, "127.0.0.1"),
        port=table.take("port", values.integer(1, 65535), 8400),
        workers=table.take("workers", values.integer(1, 256), 1),
        engines=table.take("engines", values.grpc_targets, nothing),
        engine_ca=table.take("engine_ca", values.path(base), None),
        engine_cert=table.take("engine_cert", values.path(base), None),
        engine_key=table.take("engine_key", values.path(base), None),
        engine_token_file=table.take("engine_token_file", values.path(base), None),
        engine_resolve=table.take("engine_resolve", parse_duration, timedelta(seconds=10)),
        routing=table.take("routing", values.one_of(ROUTINGS), ROUTINGS[0]),
        max_body_bytes=table.take("max_body_bytes", parse_size, 32 << 20),
        inflight_body_bytes=table.take("inflight_body_bytes", parse_size, 256 << 20),
        max_connections=table.take("max_connections", values.integer(1, 1 << 20), 4096),
        cors_origins=table.take("cors_origins", values.origins, nothing),
        drain=table.take("drain", parse_duration, timedelta(seconds=30)),
    )
    table.end()
    if (shim.engine_cert is None) != (shim.engine_key is None):
        missing = "engine_key" if shim.engine_key is None else "engine_cert"
        raise table.error(missing, "is missing; engine_cert and engine_key go together")
    if shim.inflight_body_bytes < shim.max_body_bytes:
        raise table.error("inflight_body_bytes", "must be at least max_body_bytes, or a body of that size never fits")
    return shim
