"""One life of a core: the child process, its socket and the memory in which it notes who is in its step.

Owns framing and the end of a core; how it is begun is `spawn.py`'s, who begins another is `native.py`'s. Does not know
what the messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

import msgspec

from aiexport_edge.engine.backends.spawn import CORE_COMMAND, Spawned, spawn
from aiexport_edge.engine.core.protocol import HEADER, encode_config


class CoreProcess:
    """A spawned core, which imports what it needs while it waits for `configure`: `begun` already, or begun now by
    `command`. Neither needs an event loop, so that it can be the first thing that an engine process does. Raises
    OSError where there is no process to be had.

    With `environment`, the whole of the child's, it leads a process group of its own, which is ended with it: for one
    that has children.
    """

    def __init__(
        self,
        command: Sequence[str] = CORE_COMMAND,
        *,
        environment: Mapping[str, str] | None = None,
        begun: Spawned | None = None,
    ) -> None:
        self._leads_group = environment is not None
        spawned = begun or spawn(command, environment=environment)
        self._popen, self._socket, self._suspects = spawned.popen, spawned.socket, spawned.suspects
        self._transport: asyncio.WriteTransport | None = None

    @property
    def pid(self) -> int:
        return self._popen.pid

    def configure(self, config: msgspec.Struct) -> None:
        """Its first frame; once, before `connect`. A core that has died already shows there."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(encode_config(config))

    async def connect(self, on_frame: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        """From here on each frame's body goes to `on_frame`, and the socket's end to `on_end`, on the event loop."""
        self._socket.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: Frames(on_frame, on_end), sock=self._socket)
        transport.set_write_buffer_limits(high=0)  # a frame goes out when it is written, not at the end of the turn
        self._transport = transport

    def write(self, frame: bytes) -> None:
        """Sends a frame; never blocks. After the core's end it goes nowhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def kill(self) -> None:
        """Ends it at once, also when it is stopped, and what belongs to it."""
        self._popen.kill()
        self._kill_group()

    def in_step(self) -> list[int]:
        """Handles of the requests in the steps that run, or ran when the core died."""
        return self._suspects.read()

    async def end(self, *, patience_s: float = 0.0) -> int:
        """Kills it if it still lives after so long, reaps it, frees what it used. Returns its exit status, as
        `subprocess` has it. A core that has closed its socket is given a moment, so that the status is its own.
        """
        status = await asyncio.to_thread(self._reap, patience_s)
        if self._transport is not None:
            self._transport.close()
        else:
            self._socket.close()
        self._suspects.close()
        return status

    def _reap(self, patience_s: float) -> int:
        try:
            return self._popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            return self._popen.wait()
        finally:
            self._kill_group()

    def _kill_group(self) -> None:
        if self._leads_group:
            with contextlib.suppress(ProcessLookupError):  # nobody is left in it
                os.killpg(self._popen.pid, signal.SIGKILL)


class Frames(asyncio.Protocol):
    """Cuts the byte stream into frames. A child that lives on an event loop hears its parent by it too."""

    def __init__(self, on_frame: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_end = on_end
        self._buffer = bytearray()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(buffer, start)
            end = start + HEADER.size + length
            if len(buffer) < end:
                break
            self._on_frame(bytes(buffer[start + HEADER.size : end]))
            start = end
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()
