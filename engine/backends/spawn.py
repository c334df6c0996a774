"""A core's child process as it is begun: its command, its socket, its memory file.

Apart from `core_process.py` so that an engine process can begin its core before it has imported what talks to it: a
core's imports take longest of all of a start. Does not know what is said over the socket.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aiexport_edge.engine.core.suspects import SUSPECTS_BYTES, Suspects

CORE_COMMAND = (sys.executable, "-m", "aiexport_edge.engine.core.process")


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that runs, our end of its socket, and the memory in which it notes who is in its step."""

    popen: subprocess.Popen[bytes]
    socket: socket.socket
    suspects: Suspects

    def end(self) -> None:
        """Kill it and reap it, where nobody will have it."""
        self.popen.kill()
        self.popen.wait()
        self.socket.close()
        self.suspects.close()


def spawn(command: Sequence[str] = CORE_COMMAND, *, environment: Mapping[str, str] | None = None) -> Spawned:
    """Begin one. With `environment`, the whole of the child's, it leads a process group of its own.

    Called by a thread that lives as long as the process: the kernel ends the child with the thread that forked it.
    Raises OSError where there is no process to be had.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    shared = os.memfd_create("aiexport-edge-core")
    try:
        os.ftruncate(shared, SUSPECTS_BYTES)
        suspects = Suspects(shared)
        popen = subprocess.Popen(
            [*command, "--fd", str(theirs.fileno()), "--shared-fd", str(shared)],
            pass_fds=(theirs.fileno(), shared),
            stdin=subprocess.DEVNULL,
            env=environment,
            process_group=None if environment is None else 0,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(shared)
    return Spawned(popen, ours, suspects)
