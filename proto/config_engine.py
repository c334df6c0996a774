"""`[engine]`: where the engine listens, what it computes on, and how much of the machine it may take."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.units import parse_duration


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes in bytes, 0 where the engine chooses; `num_threads` 0: one per processor core.

    `max_step_tokens` 0 ("auto"): 512 on a processor, 2048 on a card. `memory_share` is what the page pool takes of a
    card's memory beside weights, graphs and activations where `pool_bytes` does not say. `step_timeout`: a core that
    is silent for so long while it has work is ended, and its requests are resumed in another. With `drafts`, tokens
    that a text seems to repeat are guessed, and checked in one step: the text is the same, the time shorter.
    """

    listen: str
    device: str
    max_num_running: int
    max_step_tokens: int
    page_bytes: int
    pool_bytes: int
    queue_size: int
    tenant_queue_share: float
    num_threads: int
    batch_floor_share: float
    memory_share: float
    step_timeout: timedelta
    deterministic: bool | None  # None: as each model's source has it
    drafts: bool
    tls_cert: Path | None
    tls_key: Path | None
    client_ca: Path | None  # clients must show a certificate of it
    token_file: Path | None
    drain: timedelta  # how long running requests may go on after SIGTERM


def read_engine(table: Table, base: Path) -> EngineConfig:
    engine = EngineConfig(
        listen=table.take("listen", values.grpc_address, "127.0.0.1:50051"),
        device=table.take("device", values.device, "auto"),
        max_num_running=table.take("max_num_running", values.integer(1, 4096), 64),
        max_step_tokens=table.take("max_step_tokens", values.auto_integer(16, 1 << 20), 0),
        page_bytes=table.take("page_bytes", values.auto_size, 0),
        pool_bytes=table.take("pool_bytes", values.auto_size, 0),
        queue_size=table.take("queue_size", values.integer(1, 1 << 20), 1024),
        tenant_queue_share=table.take("tenant_queue_share", values.share, 0.5),
        num_threads=table.take("num_threads", values.integer(0, 1024), 0),
        batch_floor_share=table.take("batch_floor_share", values.floor_share, 0.05),
        memory_share=table.take("memory_share", values.share, 0.9),
        step_timeout=table.take("step_timeout", parse_duration, timedelta(minutes=5)),
        deterministic=table.take("deterministic", values.auto_boolean, None),
        drafts=table.take("drafts", values.boolean, True),
        tls_cert=table.take("tls_cert", values.path(base), None),
        tls_key=table.take("tls_key", values.path(base), None),
        client_ca=table.take("client_ca", values.path(base), None),
        token_file=table.take("token_file", values.path(base), None),
        drain=table.take("drain", parse_duration, timedelta(seconds=30)),
    )
    table.end()
    if (engine.tls_cert is None) != (engine.tls_key is None):
        missing = "tls_key" if engine.tls_key is None else "tls_cert"
        raise table.error(missing, "is missing; tls_cert and tls_key go together")
    if engine.client_ca is not None and engine.tls_cert is None:
        raise table.error("tls_cert", "is missing; client_ca is for clients that connect over TLS")
    return engine
