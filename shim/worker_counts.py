"""The directory in which the worker processes of one run keep their Prometheus counts (`metrics.py`).

Imports nothing of Prometheus before it is asked to: that reads the directory's name from the environment when imported.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def run_directory(state: Path) -> Path:
    """Where the workers of this run keep their counts; those of earlier runs are removed.

    A run is the life of the process that starts the workers, so that what a worker has counted outlives it, and a new
    run counts from zero.
    """
    parent = state / "metrics"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mine = parent / _run_name(os.getppid())
    mine.mkdir(mode=0o700, exist_ok=True)
    for other in parent.iterdir():
        if other != mine and other.name != _run_name(other.name.partition("-")[0]):
            shutil.rmtree(other, ignore_errors=True)
    return mine


def forget_dead_workers(directory: Path) -> None:
    """Drops the gauges of workers that are gone."""
    from prometheus_client import multiprocess

    for pid in {int(file.stem.rpartition("_")[2]) for file in directory.glob("gauge_live*.db")}:
        if not Path(f"/proc/{pid}").exists():
            multiprocess.mark_process_dead(pid, str(directory))  # type: ignore[no-untyped-call]


def _run_name(pid: int | str) -> str:
    """A process, told apart from others that have had its number."""
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5), field 22
    except OSError:
        start = "gone"
    return f"{pid}-{start}"
