"""What a run brings: rows by part, the machine it ran on, a table at the end and a JSON file. Knows no kernels."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "vllm")

Value = str | int | float | bool | None


@dataclass
class Bench:
    """One run: where, how (`dry_run`: tiny shapes on the CPU, to see that the program works), and what came of it."""

    device: torch.device
    dry_run: bool
    rows: list[dict[str, Value]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def failures(self) -> int:
        """Rows that say that something is wrong."""
        return sum(row.get("ok") is False for row in self.rows)

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def add(self, part: str, name: str, values: Mapping[str, Value]) -> None:
        """A row of the result."""
        self.rows.append({"part": part, "name": name, **values})
        self.say(f"{part} {name}: " + ", ".join(f"{key} {_shown(value)}" for key, value in values.items()))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def table(self) -> str:
        """All rows, a line each, those of one part together."""
        if not self.rows:
            return ""
        width = max(len(str(row["name"])) for row in self.rows)
        lines = []
        for row in self.rows:
            values = "  ".join(f"{key}={_shown(value)}" for key, value in row.items() if key not in ("part", "name"))
            lines.append(f"{row['part']}  {row['name']!s:<{width}}  {values}")
        return "\n".join(lines)

    def write(self, file: Path) -> None:
        """The JSON result: the machine, then the rows."""
        file.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": machine(self.device), "dry_run": self.dry_run, "rows": self.rows}
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def machine(device: torch.device) -> dict[str, Value]:
    """Card, driver, versions, commit, time."""
    facts: dict[str, Value] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "cuda": torch.version.cuda,
    }
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def result_file(device: torch.device, now: datetime) -> Path:
    """Where a run's result goes when nothing else is asked for."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "dry-run"
    return RESULTS / f"gpu-{card.lower().replace(' ', '-')}-{now:%Y%m%d-%H%M%S}.json"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _shown(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
