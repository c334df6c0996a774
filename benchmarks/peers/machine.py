"""The machine: what it is, how much of it others use, and what a tree of processes takes of it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement


def describe() -> dict[str, Any]:
    """For result files."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "features": [name for name in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if name in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The repository's state: a short hash, with a plus where files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that came of it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def pss_bytes(pid: int) -> int:
    """Memory of a tree of processes; what several share counts once. A process that ends meanwhile counts nothing."""
    total = 0
    for process in tree(pid):
        try:
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next(1024 * int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total


def num_processes(pid: int) -> int:
    return len(tree(pid))


class OthersWatch:
    """What share of all cores neither this process nor a server's tree used, from creation to `share`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._started = time.monotonic()
        self._busy, self._own = self._read()

    def share(self) -> float:
        busy, own = self._read()
        seconds = (time.monotonic() - self._started) * (os.cpu_count() or 1)
        return max(0.0, ((busy - self._busy) - (own - self._own)) / seconds)

    def _read(self) -> tuple[float, float]:
        times = psutil.cpu_times()
        busy = times.user + times.system + times.nice + times.irq + times.softirq + times.steal
        own = 0.0
        for process in [psutil.Process(), *tree(self._pid)]:
            try:
                used = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own += used.user + used.system
        return busy, own


def directory_bytes(path: Path) -> int:
    """Bytes of all files under it, links not followed."""
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def installed_bytes(*requirements: str) -> int:
    """Bytes that these distributions and all that they need take in this environment."""
    done: set[tuple[str, str]] = set()
    queue = [Requirement(text) for text in requirements]
    files: dict[str, int] = {}
    while queue:
        wanted = queue.pop()
        for extra in wanted.extras or {""}:
            if (wanted.name.lower(), extra) in done:
                continue
            done.add((wanted.name.lower(), extra))
            try:
                found = metadata.distribution(wanted.name)
            except metadata.PackageNotFoundError:
                continue
            for file in found.files or []:
                place = Path(str(file.locate()))
                if place.is_file() and not place.is_symlink():
                    files[str(place)] = place.stat().st_size
            for text in found.requires or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    queue.append(needed)
    return sum(files.values())
