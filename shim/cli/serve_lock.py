"""The file `serve.lock` of a state directory: one `serve` holds it while it runs, and says in it where it listens.

Its lines are the process id, then HOST:PORT of the REST listener and of the operator's, as this machine reaches them.
The lock is the kernel's: it ends with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiexport_edge.shim.cli.command import CommandError

NAME = "serve.lock"
_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Serving:
    """A `serve` that runs. Its addresses are None until it has opened its listeners."""

    pid: str
    rest: str | None
    admin: str | None


@contextmanager
def held(state: Path) -> Iterator[Callable[[str, str], None]]:
    """Held while this process serves; what it yields is told the two addresses.

    Raises `CommandError` with the other's pid where another serves, or where there can be no lock.
    """
    descriptor = os.open(state / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def say(*lines: str) -> None:
        text = "".join(f"{line}\n" for line in (str(os.getpid()), *lines)).encode()
        try:
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
        except OSError as error:
            raise CommandError(
                f"{state / NAME} can't be written ({error.strerror}); make room on its disk, or use another --state"
            ) from None

    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _read(descriptor).pid or "unknown"
            raise CommandError(
                f"another serve (pid {pid}) runs on {state}; stop it, or give this one a --state of its own"
            ) from None
        except OSError as error:
            raise CommandError(
                f"{state / NAME} can't be locked ({error.strerror}); name a --state on a disk of this machine"
            ) from None
        say()
        yield say
    finally:
        os.close(descriptor)


def serving(state: Path) -> Serving | None:
    """The `serve` that holds the lock of this state directory; None where none does."""
    try:
        descriptor = os.open(state / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _read(descriptor: int) -> Serving:
    lines = os.pread(descriptor, _MAX_BYTES, 0).decode(errors="replace").split("\n")
    pid, rest, admin, *_ = *lines, "", ""
    return Serving(pid.strip(), rest or None, admin or None)
