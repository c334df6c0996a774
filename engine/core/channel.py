"""Frames over the socket between a core and its parent, from the core's side: never blocked by a slow reader.

Owns framing and buffering (4 bytes of little-endian length, then the body). Knows nothing of what the bodies mean.
"""

from __future__ import annotations

import select
import socket

from aiexport_edge.engine.core.protocol import HEADER

_RECEIVE_BYTES = 256 * 1024
_SEND_BUFFER_BYTES = 4 * 1024 * 1024  # asked for; the system may give less
_MAX_BACKLOG_BYTES = 256 * 1024 * 1024


class ChannelClosed(Exception):
    """The parent is gone."""


class Channel:
    """One end of a stream socket. What the socket does not take at once is kept and sent with what comes later."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._socket = sock
        self._received = bytearray()
        self._backlog = bytearray()

    def send(self, frame: bytes) -> None:
        """Send a whole frame, header included, after those sent before. Never waits.

        Raises `ChannelClosed` when the parent is gone, or has read nothing for so long that it must be hung.
        """
        self._backlog += frame
        if len(self._backlog) > _MAX_BACKLOG_BYTES:
            raise ChannelClosed("the parent has stopped reading")
        self._push()

    def flush(self) -> None:
        """Wait until all that was sent is on its way."""
        while self._backlog:
            self._wait(0)
            self._push()

    def receive(self, *, wait: bool, at_most: int | None = None) -> list[bytes]:
        """The bodies of all frames that have arrived, or of the first `at_most` of them; with `wait`, at least one.

        Raises `ChannelClosed` when the parent has closed its end.
        """
        while True:
            self._push()
            frames = self._split(at_most)
            if not frames:
                self._pull()
                frames = self._split(at_most)
            if frames or not wait:
                return frames
            self._wait(select.POLLIN)

    def _wait(self, events: int) -> None:
        # Not select(), which knows descriptors below 1,024 only: a parent with many clients passes on a higher one.
        poll = select.poll()
        poll.register(self._socket, events | (select.POLLOUT if self._backlog else 0))
        poll.poll()

    def _push(self) -> None:
        try:
            while self._backlog:
                sent = self._socket.send(self._backlog)
                del self._backlog[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed from error

    def _pull(self) -> None:
        try:
            while data := self._socket.recv(_RECEIVE_BYTES):
                self._received += data
        except BlockingIOError:
            return
        except OSError as error:
            raise ChannelClosed from error
        raise ChannelClosed

    def _split(self, at_most: int | None) -> list[bytes]:
        frames: list[bytes] = []
        at = 0
        while len(self._received) - at >= HEADER.size and len(frames) != at_most:
            (size,) = HEADER.unpack_from(self._received, at)
            end = at + HEADER.size + size
            if len(self._received) < end:
                break
            frames.append(bytes(memoryview(self._received)[at + HEADER.size : end]))
            at = end
        del self._received[:at]
        return frames
