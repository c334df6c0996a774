"""When requests come and how long they are: at a fixed rate, by a real trace, or like one. Knows no HTTP."""

from __future__ import annotations

import csv
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRACE = Path("traces") / "AzureLLMInferenceTrace_conv.csv"  # under the folder of AIEXPORT_TEST_DATA
# Of that trace (Patel et al., Splitwise, ISCA 2024): medians of its lengths, and how wide their logarithms spread.
MEDIAN_PROMPT, MEDIAN_OUTPUT = 1020, 129
SPREAD_PROMPT, SPREAD_OUTPUT = 0.9, 0.8
BURSTINESS = 0.6  # shape of the gamma distribution of the gaps between arrivals: below 1 they come in bursts


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to be sent `at_s` seconds after the start."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """The longest that may be asked for: a trace knows nothing of the model that it is replayed to."""

    prompt_tokens: int
    output_tokens: int

    def clip(self, at_s: float, prompt_tokens: float, output_tokens: float) -> Arrival:
        return Arrival(
            at_s,
            max(1, min(round(prompt_tokens), self.prompt_tokens)),
            max(1, min(round(output_tokens), self.output_tokens)),
        )


def trace_file() -> Path | None:
    """Where the trace is; None where it is not."""
    file = Path(os.environ.get("AIEXPORT_TEST_DATA", ROOT.parent / "shared" / "data")) / TRACE
    return file if file.is_file() else None


def fixed(rate: float, seconds: float, *, prompt_tokens: int, output_tokens: int) -> list[Arrival]:
    """Every 1 / `rate` seconds one, all alike."""
    return [Arrival(number / rate, prompt_tokens, output_tokens) for number in range(math.ceil(rate * seconds))]


def synthetic(rate: float, seconds: float, bounds: Bounds, *, seed: int = 0) -> list[Arrival]:
    """In bursts, of lengths as the trace has them; the same every time."""
    draw = random.Random(seed)
    arrivals = []
    at_s = 0.0
    while (at_s := at_s + draw.gammavariate(BURSTINESS, 1 / (BURSTINESS * rate))) < seconds:
        prompt_tokens = draw.lognormvariate(math.log(MEDIAN_PROMPT), SPREAD_PROMPT)
        output_tokens = draw.lognormvariate(math.log(MEDIAN_OUTPUT), SPREAD_OUTPUT)
        arrivals.append(bounds.clip(at_s, prompt_tokens, output_tokens))
    return arrivals


def replayed(file: Path, rate: float, seconds: float, bounds: Bounds) -> list[Arrival]:
    """The beginning of a trace, its clock stretched or shrunk so that `rate` requests come a second on average."""
    wanted = max(2, math.ceil(rate * seconds))
    rows = []
    for moment, prompt_tokens, output_tokens in _rows(file):
        rows.append((moment, prompt_tokens, output_tokens))
        if len(rows) == wanted:
            break
    first, last = rows[0][0], rows[-1][0]
    stretch = seconds / max((last - first).total_seconds(), 1e-9)
    return [
        bounds.clip((moment - first).total_seconds() * stretch, prompt_tokens, output_tokens)
        for moment, prompt_tokens, output_tokens in rows
    ]


def _rows(file: Path) -> Iterator[tuple[datetime, int, int]]:
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            moment = datetime.fromisoformat(row["TIMESTAMP"][:26])  # its seventh decimal is more than a clock has here
            yield moment, int(row["ContextTokens"]), int(row["GeneratedTokens"])
