"""The files of a worker's Prometheus counts, with their room on the disk taken before it is written.

Prometheus's library makes them as holes and maps them into memory: on a full disk the first write into such a hole
kills the process (SIGBUS), and each that is started in its place. Here a count for which the disk has no room is kept
in memory instead: the worker goes on, and its counts are missing from what other workers answer.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

FIRST_BYTES = 1 << 16
_MOST_PER_KEY = 32  # besides the key: its length, its padding, two doubles


class CountFile(MmapedDict):
    """`MmapedDict` in room that it is sure to have."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        if read_mode or _is_allocated(filename):
            super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]
            return
        memory = os.memfd_create("counts")
        super().__init__(f"/proc/self/fd/{memory}")  # type: ignore[no-untyped-call]
        os.close(memory)

    def _init_value(self, key: str) -> None:
        if self._used + len(key.encode()) + _MOST_PER_KEY > self._capacity:
            try:
                os.posix_fallocate(self._f.fileno(), 0, 2 * self._capacity)
            except OSError:
                self._move_to_memory()
        super()._init_value(key)  # type: ignore[no-untyped-call]

    def _move_to_memory(self) -> None:
        """All goes on in a file of which nobody else knows; what was counted so far stays where it is, too."""
        file: Any = os.fdopen(os.memfd_create("counts"), "a+b")
        file.write(self._m[: self._capacity])
        file.flush()
        self._f.close()
        self._f = file


def _is_allocated(filename: str) -> bool:
    """Whether the file is there, as many zeros as it begins with. It appears whole: others read it at any time."""
    if os.path.exists(filename):
        return True
    fresh = f"{filename}.new"
    try:
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, FIRST_BYTES)
        finally:
            os.close(descriptor)
        os.rename(fresh, filename)
    except OSError:
        Path(fresh).unlink(missing_ok=True)
        return False
    return True


def use() -> None:
    """For all counts that are made from now on."""
    values.MmapedDict = CountFile  # type: ignore[attr-defined]
