"""`[adapters]`: fine-tuned models, which are low-rank adapters of the models: where they may lie, what they may take,
and what they cost.

A processor's memory is taken by adapters that are there; a card's is set aside at the start, and only where `roots` or
`slots` say that there will be any.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aiexport_edge.proto import config_values as values
from aiexport_edge.proto.config_table import Table
from aiexport_edge.proto.units import parse_size

MOST_SLOTS = 1024
MOST_RANK = 256
CARD_SLOTS, CARD_RANK = 8, 64  # where the configuration does not say


@dataclass(frozen=True, slots=True)
class AdaptersConfig:
    """`roots`: directories that hold the adapters' own, besides that of the state directory, into which others are
    copied. Each model keeps up to `slots` adapters of at most `max_rank` on the device, and more in `host_bytes` of
    memory; the rest are read when they are wanted. 0: 8 of the largest rank there is on a processor; on a card none, or
    with `roots` 8, of rank 64. The surcharges are US dollars per million tokens, on the base model's prices.
    """

    roots: tuple[Path, ...] = ()
    slots: int = 0
    max_rank: int = 0
    host_bytes: int = 1 << 30
    input_surcharge: float = 1.0
    output_surcharge: float = 5.0

    @property
    def card_slots(self) -> int:
        """Places that a card sets memory aside for."""
        return self.slots or (CARD_SLOTS if self.roots else 0)

    @property
    def card_rank(self) -> int:
        """The largest rank that these have room for."""
        return self.max_rank or CARD_RANK


def read_adapters(table: Table, base: Path) -> AdaptersConfig:
    default = AdaptersConfig()
    adapters = AdaptersConfig(
        roots=table.take("roots", values.directories(base), default.roots),
        slots=table.take("slots", values.auto_integer(1, MOST_SLOTS), default.slots),
        max_rank=table.take("max_rank", values.auto_integer(1, MOST_RANK), default.max_rank),
        host_bytes=table.take("host_bytes", parse_size, default.host_bytes),
        input_surcharge=table.take("input_surcharge", values.price, default.input_surcharge),
        output_surcharge=table.take("output_surcharge", values.price, default.output_surcharge),
    )
    table.end()
    return adapters
