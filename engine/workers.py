"""A child process that is asked one thing at a time, within a time: for work that a stranger's input could make long,
large or deadly. The engine process itself never does such work.

Owns the child's life and the messages between the two: how many parts, then each part behind its length (4 bytes,
little-endian). Does not know what is asked. `serve` is the child's side.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence

from aiexport_edge.proto.lifetime import PARENT_PID

LENGTH = struct.Struct("<I")
NICENESS = 10  # such work can wait: the replies of others come first
_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


class WorkerDied(Exception):
    """The child is no more."""


class Worker:
    """One child. `ask` from one thread at a time. Raises OSError where there is no process to be had.

    Made by a thread that lives as long as the process: the kernel ends the child with the thread that forked it.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """`command` is given `--fd N` besides."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._popen = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT, **(environment or {}), PARENT_PID: str(os.getpid())},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._socket = ours
        self.pid = self._popen.pid

    def ask(self, question: Sequence[bytes], timeout_s: float, *, patience: float = 1.0) -> list[bytes]:
        """The parts of the answer. `timeout_s` are of the clock; with `patience` of the child's processor time, and up
        to `patience` times as many of the clock, where the machine has other work.

        Raises `WorkerDied` and `TimeoutError`; then it is of no more use: `end` it.
        """
        deadline = time.monotonic() + timeout_s
        try:
            self._wait_at_most(deadline)
            _send(self._socket, question)
            if patience > 1.0:
                self._wait_for_answer(timeout_s, deadline + (patience - 1.0) * timeout_s)
                deadline = time.monotonic() + timeout_s
            num_parts = LENGTH.unpack(self._receive(LENGTH.size, deadline))[0]
            return [self._receive_part(deadline) for _ in range(num_parts)]
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
                self._popen.kill()
                raise TimeoutError from None
            raise WorkerDied from None

    @property
    def lives(self) -> bool:
        """Whether it is there to be asked."""
        return self._popen.poll() is None

    def kill(self) -> None:
        """Ends it at once; whoever waits for its answer is told."""
        self._popen.kill()

    def end(self) -> int:
        """Reaps it and frees what it used. Its exit status, as `subprocess` has it."""
        self._socket.close()
        self._popen.kill()
        return self._popen.wait()

    def _wait_for_answer(self, processor_s: float, latest: float) -> None:
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        end = self._processor_s() + processor_s
        left = processor_s
        while not ready.poll(1000 * max(0.05, left)):
            left = min(end - self._processor_s(), latest - time.monotonic())
            if left <= 0:
                raise BlockingIOError(errno.EAGAIN, "the time is over")

    def _processor_s(self) -> float:
        """What the child has used so far."""
        with open(f"/proc/{self.pid}/stat", "rb") as stat:
            user, system = stat.read().rpartition(b")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _receive_part(self, deadline: float) -> bytes:
        return self._receive(LENGTH.unpack(self._receive(LENGTH.size, deadline))[0], deadline)

    def _receive(self, num_bytes: int, deadline: float) -> bytes:
        pieces: list[bytes] = []
        left = num_bytes
        while left:
            self._wait_at_most(deadline)
            piece = self._socket.recv(left, socket.MSG_WAITALL)
            if not piece:
                raise WorkerDied
            pieces.append(piece)
            left -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _wait_at_most(self, deadline: float) -> None:
        """The kernel's timeouts rather than Python's, whose sockets do not block: one read then takes all there is."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise BlockingIOError(errno.EAGAIN, "the time is over")
        value = struct.pack("ll", *divmod(int(left * 1e6) + 1, 1_000_000))  # a timeval; 0 would be for ever
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def serve(fd: int, answer: Callable[[list[bytes]], Sequence[bytes]], *, memory_bytes: int) -> None:
    """The child's side: answers until its parent is gone. It may take `memory_bytes` of address space besides what is
    loaded, and writes no files.
    """
    os.nice(NICENESS)
    with open("/proc/self/statm") as statm:
        loaded = int(statm.read().split()[0]) * resource.getpagesize()
    for what, value in (
        (resource.RLIMIT_AS, loaded + memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (value, value))
    sock = socket.socket(fileno=fd)
    with contextlib.suppress(EOFError):
        while True:
            _send(sock, answer(_receive_message(sock)))


def _send(sock: socket.socket, parts: Sequence[bytes]) -> None:
    sock.sendall(LENGTH.pack(len(parts)))
    for part in parts:
        sock.sendall(LENGTH.pack(len(part)))
        sock.sendall(part)


def _receive_message(sock: socket.socket) -> list[bytes]:
    num_parts = LENGTH.unpack(_receive_all(sock, LENGTH.size))[0]
    return [_receive_all(sock, LENGTH.unpack(_receive_all(sock, LENGTH.size))[0]) for _ in range(num_parts)]


def _receive_all(sock: socket.socket, num_bytes: int) -> bytes:
    """Raises EOFError where the socket has ended."""
    data = sock.recv(num_bytes, socket.MSG_WAITALL) if num_bytes else b""
    if len(data) < num_bytes:
        raise EOFError
    return data
