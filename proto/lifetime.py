"""How a child process of the product ends with the process that started it, however that one ended.

Owns the environment variable between the two. Knows nothing of what either does. Linux only; elsewhere a child outlives
a parent that was killed, and ends when it finds its sockets closed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PARENT_PID = "AIEXPORT_EDGE_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_parent() -> None:
    """Called first by a child's main: from here on the kernel kills this process when its parent ends.

    Does nothing where `AIEXPORT_EDGE_PARENT_PID` is not set (started by a person or by another supervisor). The kernel
    watches the parent's *thread* that forked, so a parent starts its children from a thread that stays.
    """
    parent = os.environ.pop(PARENT_PID, "")
    if parent:
        end_with(int(parent))


def end_with(parent_pid: int) -> None:
    """As `die_with_parent`, of a process that knows who began it."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before prctl was called
        os._exit(1)
