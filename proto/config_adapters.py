"""`[adapters]`: fine-tuned models, which are low-rank adapters of the models: where they may lie, what they may take,
and what they cost.

Without `roots` no adapter is served, and no memory is kept for any.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.units import parse_size

if TYPE_CHECKING:
    from aiexport_edge.proto.config import _Table

MOST_SLOTS = 1024
MOST_RANK = 256


@dataclass(frozen=True, slots=True)
class AdaptersConfig:
    """`roots`: directories that hold the adapters' own. Each model keeps up to `slots` adapters of at most `max_rank`
    on the device, and more in `host_bytes` of memory; the rest are read when they are wanted. The surcharges are US
    dollars per million tokens, on the base model's prices.
    """

    roots: tuple[Path, ...] = ()
    slots: int = 8
    max_rank: int = 64
    host_bytes: int = 1 << 30
    input_surcharge: float = 1.0
    output_surcharge: float = 5.0


def read_adapters(table: _Table, base: Path) -> AdaptersConfig:
    default = AdaptersConfig()
    adapters = AdaptersConfig(
        roots=table.take("roots", values.directories(base), default.roots),
        slots=table.take("slots", values.integer(1, MOST_SLOTS), default.slots),
        max_rank=table.take("max_rank", values.integer(1, MOST_RANK), default.max_rank),
        host_bytes=table.take("host_bytes", parse_size, default.host_bytes),
        input_surcharge=table.take("input_surcharge", values.price, default.input_surcharge),
        output_surcharge=table.take("output_surcharge", values.price, default.output_surcharge),
    )
    table.end()
    return adapters
