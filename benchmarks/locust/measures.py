"""What a run has brought, tier by tier, and whether that is enough. Knows no HTTP and no locust."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = Path(__file__).with_name("targets.toml")
CLIENT = "client"  # the section of what the client itself may add
_MEASURES = ("first_token", "gap", "end_to_end")


class TargetsError(Exception):
    """The targets file cannot be used; a sentence."""


@dataclass(slots=True)
class Tier:
    """The samples of one tier, in milliseconds."""

    first_token: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)
    end_to_end: list[float] = field(default_factory=list)
    output_tokens: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.end_to_end) + len(self.failures)


@dataclass(frozen=True, slots=True)
class Target:
    """`percentile` of `measure` may be at most `limit` milliseconds; "failures": at most that share of the requests."""

    tier: str
    measure: str
    percentile: float
    limit: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a target. Without a sample it is not met."""

    target: Target
    value: float | None

    @property
    def met(self) -> bool:
        return self.value is not None and self.value <= self.target.limit


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest rank: a value that was really measured."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def read_targets(file: Path) -> list[Target]:
    """`[TIER]` with `first_token = { p50 = MS, … }`, `gap`, `end_to_end`, `failures = SHARE`; `[client]` with `lag`.

    Raises `TargetsError`.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise TargetsError(f"{file} cannot be read: {error}") from None
    targets = []
    for tier, wanted in document.items():
        known = ("lag",) if tier == CLIENT else (*_MEASURES, "failures")
        for measure, value in wanted.items():
            if measure not in known:
                raise TargetsError(f"{file}: [{tier}] {measure} is not known; there are {', '.join(known)}")
            if measure == "failures":
                targets.append(Target(tier, measure, 100.0, float(value)))
                continue
            for name, limit in value.items():
                if not (name[:1] == "p" and name[1:].replace(".", "", 1).isdigit()):
                    raise TargetsError(f"{file}: [{tier}] {measure}.{name} is not a percentile such as p50")
                targets.append(Target(tier, measure, float(name[1:]), float(limit)))
    return targets


def judge(targets: Sequence[Target], tiers: Mapping[str, Tier], lag_ms: Sequence[float]) -> list[Verdict]:
    """One verdict a target, for the tiers that were asked."""
    verdicts = []
    for target in targets:
        if target.tier == CLIENT:
            samples: Sequence[float] = lag_ms
        elif target.tier not in tiers:
            continue
        else:
            tier = tiers[target.tier]
            if target.measure == "failures":
                verdicts.append(Verdict(target, len(tier.failures) / tier.requests if tier.requests else None))
                continue
            samples = getattr(tier, target.measure)
        verdicts.append(Verdict(target, percentile(samples, target.percentile) if samples else None))
    return verdicts


def table(verdicts: Sequence[Verdict]) -> str:
    """One line a verdict."""
    lines = []
    for verdict in verdicts:
        target = verdict.target
        if target.measure == "failures":
            name, unit, scale = "failures", "%", 100.0
        else:
            name, unit, scale = f"{target.measure.replace('_', ' ')} p{target.percentile:g}", "ms", 1.0
        value = "none" if verdict.value is None else f"{verdict.value * scale:.1f}"
        says = "met" if verdict.met else "MISSED"
        lines.append(f"{target.tier:<8} {name:<18} {value:>9} {unit:<2} (at most {target.limit * scale:g}) {says}")
    return "\n".join(lines)


def document(tiers: Mapping[str, Tier], verdicts: Sequence[Verdict], lag_ms: Sequence[float]) -> dict[str, Any]:
    """All of it as JSON values."""
    return {
        "tiers": {
            name: {
                "requests": tier.requests,
                "output_tokens": tier.output_tokens,
                "failures": tier.failures[:20],
                **{measure: _spread(getattr(tier, measure)) for measure in _MEASURES},
            }
            for name, tier in tiers.items()
        },
        "client_lag": _spread(lag_ms),
        "targets": [
            {
                "tier": verdict.target.tier,
                "measure": verdict.target.measure,
                "percentile": verdict.target.percentile,
                "limit": verdict.target.limit,
                "value": verdict.value,
                "met": verdict.met,
            }
            for verdict in verdicts
        ],
    }


def verdicts_of(document: Mapping[str, Any]) -> list[Verdict]:
    """Those of a `document`."""
    return [
        Verdict(Target(row["tier"], row["measure"], row["percentile"], row["limit"]), row["value"])
        for row in document["targets"]
    ]


def _spread(samples: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": round(percentile(samples, percent), 2) for percent in (50, 90, 99)} if samples else {}
