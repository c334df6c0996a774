"""Memory that was freed goes back to the system: the C library left to itself keeps most of it.

Linux with glibc only; elsewhere nothing is done. Knows no requests.
"""

from __future__ import annotations

import asyncio
import ctypes
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
TRIM_S = 0.5  # after something large was freed: what else was made of it is then free too


def _function(name: str) -> Any:
    """The C library's, or None."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)  # not in musl


def set_up() -> None:
    """Has large buffers returned when they are freed, so that one body of 32 MiB does not stay.

    Left to itself the library raises the size from which a buffer is mapped on its own to the largest that was ever
    freed.
    """
    mallopt = _function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 256 << 10)
        mallopt(_M_TRIM_THRESHOLD, 1 << 20)
        mallopt(_M_ARENA_MAX, 2)


class Trimmer:
    """Returns the pieces in between too, which stay where a buffer's neighbours are in use: some milliseconds of work,
    off the event loop, once for all that ask within `TRIM_S`.
    """

    def __init__(self) -> None:
        self._trim = _function("malloc_trim")
        self._is_due = False

    def soon(self) -> None:
        """Something large was freed. Called on an event loop."""
        if self._trim is None or self._is_due:
            return
        self._is_due = True
        asyncio.get_running_loop().call_later(TRIM_S, self._start)

    def _start(self) -> None:
        self._is_due = False
        asyncio.get_running_loop().run_in_executor(None, self._trim, 0)
