"""What a token costs, in whole units of 1e-12 US dollars: sums of any length stay exact.

A price per million tokens has at most six decimals in these units; what lies below is rounded once, here.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from functools import cache

UNITS_PER_DOLLAR = 10**12
_PER_MILLION = UNITS_PER_DOLLAR // 10**6


@dataclass(frozen=True, slots=True)
class Price:
    """Of one token, read (from the cache too) and written."""

    input: int
    output: int

    @classmethod
    def per_million(cls, input_dollars: float, output_dollars: float, *, batch: bool = False) -> Price:
        """From US dollars per million tokens; a batch pays half."""
        return cls(_units(input_dollars, 2 if batch else 1), _units(output_dollars, 2 if batch else 1))


def dollars(units: int) -> Decimal:
    """Exact, without trailing zeros."""
    amount = Decimal(units).scaleb(-12)
    return amount.quantize(Decimal(1)) if amount == amount.to_integral() else amount.normalize()


@cache
def _units(per_million: float, divisor: int) -> int:
    return int((Decimal(repr(per_million)) * _PER_MILLION / divisor).to_integral_value())
