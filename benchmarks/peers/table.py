"""Results as tables: `python -m benchmarks.peers.table FILE.json` prints them in Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.cells import CELLS

FIGURES = (
    ("tokens_per_s", "tokens_per_s_spread", "Tokens/s"),
    ("first_token_p50_ms", "first_token_spread", "First token, p50, ms"),
    ("gap_p50_ms", None, "Between tokens, p50, ms"),
    ("gap_p99_ms", None, "Between tokens, p99, ms"),
)


def _cell(figures: dict[str, Any] | None, name: str, noise: str | None) -> str:
    if figures is None:
        return "–"
    value = figures[name]
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}"
    if noise is not None and figures[noise] is not None:
        text += f" ±{50 * figures[noise]:.0f} %"
    return text + (" *" if figures["others_cpu_share"] > 0.05 else "")


def print_tables(document: dict[str, Any]) -> None:
    """One table a figure, cells down and servers across; then what each server takes."""
    servers: dict[str, Any] = document["servers"]
    names = list(servers)
    for figure, noise, title in FIGURES:
        print(f"\n| {title} | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
        for cell in CELLS:
            row = [_cell(servers[name]["cells"].get(cell.key), figure, noise) for name in names]
            if any(text != "–" for text in row):
                print(f"| {cell.key} | {' | '.join(row)} |")
    print(f"\n| Whole server | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
    for key, title in (
        ("cold_start_s", "Start to first token, s"),
        ("memory_mib", "Memory (PSS of all processes), MiB"),
        ("processes", "Processes"),
        ("install_mib", "Installed, MiB"),
    ):
        print(f"| {title} | {' | '.join(str(servers[name].get(key, '–')) for name in names)} |")
    print("\n± half the spread of the rounds; * other programs used more than 5 % of the machine meanwhile.")


if __name__ == "__main__":
    print_tables(json.loads(Path(sys.argv[1]).read_text()))
