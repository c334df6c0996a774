"""`[batches]`: how large a batch may be, and how much of it is under way at one time."""

from __future__ import annotations

from dataclasses import dataclass

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.units import parse_size


@dataclass(frozen=True, slots=True)
class BatchesConfig:
    """`max_in_flight`: requests of batches that one shim process has at the engines, whatever room they have."""

    max_body_bytes: int
    max_in_flight: int


def read_batches(table: Table) -> BatchesConfig:
    batches = BatchesConfig(
        max_body_bytes=table.take("max_body_bytes", parse_size, 256 << 20),
        max_in_flight=table.take("max_in_flight", values.integer(1, 4096), 256),
    )
    table.end()
    return batches
