"""Keeps child processes running until they are to stop.

Owns their start, their replacement when they end by themselves, and their orderly end. Knows nothing of what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

from aiexport_edge.proto.lifetime import PARENT_PID

FIRST_DELAY = 0.1  # seconds before a dead child is started again, doubled each time up to LAST_DELAY
LAST_DELAY = 10.0
_STDERR = 2
SETTLED = 30.0  # a child that has lived so long starts again with FIRST_DELAY


def log(line: str) -> None:
    """A line on stderr. A disk that is full, or a reader who has left or stands still, is no reason to stop serving."""
    with contextlib.suppress(OSError):
        poll = select.poll()
        poll.register(_STDERR, select.POLLOUT)
        if poll.poll(0):
            os.write(_STDERR, f"aiexport-edge: {line}\n".encode(errors="backslashreplace"))


class StartFailed(Exception):
    """A child gave up by itself before the installation was ever ready: trying again would change nothing."""


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A command, the descriptors that it inherits under their own numbers, the variables that it does not inherit."""

    name: str
    argv: tuple[str, ...]
    pass_fds: tuple[int, ...] = ()
    hidden: tuple[str, ...] = ()


class Child:
    """One process, replaced whenever it ends, until `stop`."""

    def __init__(self, spec: ChildSpec, log: Callable[[str], None]) -> None:
        self.spec = spec
        self.proven = False  # once the whole installation has been ready: from then on every end is worth a restart
        self._log = log
        self._stopping = False
        self._process: asyncio.subprocess.Process | None = None
        self._keeping = asyncio.ensure_future(self._keep())

    @property
    def ended(self) -> asyncio.Future[None]:
        """Done when the child is given up (`StartFailed`) or has stopped."""
        return self._keeping

    async def _keep(self) -> None:
        delay = FIRST_DELAY
        while not self._stopping:
            started = time.monotonic()
            self._process = await self._spawn()
            if self._stopping:
                self._process.terminate()
            status = await self._process.wait()
            if self._stopping:
                return
            if status > 0 and not self.proven:
                raise StartFailed(f"the {self.spec.name} could not start; its last message above says why")
            if time.monotonic() - started > SETTLED:
                delay = FIRST_DELAY
            self._log(f"the {self.spec.name} {_how(status)}; starting it again")
            await asyncio.sleep(delay)
            delay = min(2 * delay, LAST_DELAY)

    async def _spawn(self) -> asyncio.subprocess.Process:
        # A session of its own: Ctrl-C at the terminal reaches the supervisor alone, which drains them in order. Its
        # stdout is ours for messages to the person, so a child's goes to stderr.
        return await asyncio.create_subprocess_exec(
            *self.spec.argv,
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,
            pass_fds=self.spec.pass_fds,
            start_new_session=True,
            env={
                **{name: value for name, value in os.environ.items() if name not in self.spec.hidden},
                PARENT_PID: str(os.getpid()),
            },
        )

    async def stop(self, seconds: float) -> None:
        """SIGTERM, at most `seconds` of patience, SIGKILL. Returns when the process is gone; never raises."""
        self._stopping = True
        if self._process is None or self._process.returncode is not None:
            self._keeping.cancel()
        else:
            self._process.terminate()
        done, _ = await asyncio.wait([self._keeping], timeout=seconds)
        if not done:
            self._log(f"the {self.spec.name} has not ended within {seconds:.0f} s; killing it")
            self.kill()
            await asyncio.wait([self._keeping])

    def kill(self) -> None:
        """SIGKILL, for good."""
        self._stopping = True
        if self._process is not None and self._process.returncode is None:
            self._process.kill()


def _how(status: int) -> str:
    if status < 0:
        return f"was killed ({signal.Signals(-status).name})"
    return f"ended (status {status})"
