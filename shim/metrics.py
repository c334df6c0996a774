"""What this process counts, for Prometheus. Owns the names; `render` gives the text over all worker processes.

With `PROMETHEUS_MULTIPROC_DIR` set before this module is imported (`server.py` does), the counts of all workers lie in
files there and any of them can answer.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from aiexport_edge.shim import count_files

count_files.use()

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_registry = CollectorRegistry()

REQUESTS = Counter("aiexport_http_requests", "Requests answered", ["route", "method", "status"], registry=_registry)
REQUEST_SECONDS = Histogram(
    "aiexport_http_request_seconds",
    "From the request's head to the reply's end",
    ["route"],
    buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300),
    registry=_registry,
)
FIRST_TOKEN_SECONDS = Histogram(
    "aiexport_first_token_seconds",
    "From the request's head to the first text",
    ["model"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2, 5, 10, 30, 60),
    registry=_registry,
)
TOKENS = Counter("aiexport_tokens", "Tokens of ended requests", ["model", "kind"], registry=_registry)
MESSAGES = Counter("aiexport_messages", "Message requests by how they ended", ["model", "outcome"], registry=_registry)
BATCH_REQUESTS = Counter(
    "aiexport_batch_requests", "Requests of batches by how they ended", ["model", "outcome"], registry=_registry
)
IN_FLIGHT = Gauge(
    "aiexport_messages_in_flight",
    "Message requests admitted and not ended",
    multiprocess_mode="livesum",
    registry=_registry,
)
BODY_BYTES = Gauge(
    "aiexport_body_bytes_in_flight", "Bytes of request bodies held", multiprocess_mode="livesum", registry=_registry
)
ENGINES_CONNECTED = Gauge(
    "aiexport_engines_connected", "Engine sessions that are up", multiprocess_mode="livesum", registry=_registry
)
RESUMED = Counter("aiexport_resumed", "Replies that went on after their engine was lost", registry=_registry)
RETRIED = Counter("aiexport_retried", "Times that a request was asked of a further engine", registry=_registry)
ROUTED = Counter("aiexport_routed", "Choices of an engine by their reason", ["reason"], registry=_registry)
ENGINE_STATE = Gauge(
    "aiexport_engine_state",
    "Shim workers that see an engine in a state",
    ["engine", "state"],
    multiprocess_mode="livesum",
    registry=_registry,
)
ENGINE_REQUESTS = Gauge(
    "aiexport_engine_requests",
    "Requests that are placed at an engine",
    ["engine"],
    multiprocess_mode="livesum",
    registry=_registry,
)
ENGINE_ACCEPTED = Counter(
    "aiexport_engine_accepted", "Requests that an engine has taken", ["engine"], registry=_registry
)
ENGINE_EJECTIONS = Counter(
    "aiexport_engine_ejections", "Times that an engine was given up for a while", ["engine"], registry=_registry
)
ENGINE_PROMPT_TOKENS = Counter(
    "aiexport_engine_prompt_tokens",
    "Prompt tokens of requests that began at an engine, all and those that it had cached",
    ["engine", "kind"],
    registry=_registry,
)
LIMITS_LOCAL = Gauge(
    "aiexport_limits_counted_locally",
    "1 while Redis is away and each machine counts requests a minute by itself",
    multiprocess_mode="livemax",
    registry=_registry,
)


def render() -> bytes:
    """The exposition text."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return generate_latest(_registry)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)
