"""Bars of a result file: `python -m benchmarks.peers.plot FILE.json FILE.png`.

Tokens per second of every server in every cell, and the first token, whose axis is logarithmic.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.cells import CELLS

FIGURES = (
    ("tokens_per_s", "tokens/s, all streams together", "linear"),
    ("first_token_p50_ms", "first token, ms", "log"),
)
MARGIN = 0.85  # of a cell's width that bars fill


def draw(document: dict[str, Any], target: Path) -> None:
    """Write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    servers: dict[str, Any] = document["servers"]
    figure, axes = plt.subplots(len(FIGURES), 1, figsize=(10, 7), layout="constrained")
    width = MARGIN / len(servers)
    for axis, (name, title, scale) in zip(axes, FIGURES, strict=True):
        for number, (server, found) in enumerate(servers.items()):
            places = [place for place, cell in enumerate(CELLS) if cell.key in found["cells"]]
            values = [found["cells"][CELLS[place].key][name] for place in places]
            axis.bar([place + (number + 0.5) * width - MARGIN / 2 for place in places], values, width, label=server)
        axis.set_xticks(range(len(CELLS)), [cell.key.replace(" (", "\n(") for cell in CELLS], fontsize=8)
        axis.set_yscale(scale)
        axis.set_ylabel(title)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(ncols=len(servers))
    machine = document["machine"]
    axes[0].set_title(f"Qwen3-0.6B shapes, {machine['processor']}, {machine['cores']} cores, {document['date']}")
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
