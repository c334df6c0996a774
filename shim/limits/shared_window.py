"""The calls of a minute in memory that the processes of one machine share: a few microseconds a call, no I/O.

A workspace has a file, mapped into every process, with a ring of the times of its last calls:

    | layout | capacity | head | time 0 | time 1 | … |    call n lies at n % capacity; the last is head - 1

It holds at least as many calls as the limit, so that the call `limit` places before the next tells everything: if it is
older than a minute, there is room. Times are CLOCK_MONOTONIC's, which all processes of a machine read alike and no
operator sets. A file lock guards each look, which takes microseconds; the kernel drops it with a process that dies. A
process that is killed halfway leaves the ring readable and wrong by its own call at most.

The files live in memory (/dev/shm), where no full or slow disk holds up an event loop; a restart of the machine empties
them, which a sliding minute can bear. They are found by the identity of the state directory: processes that share one
share its limits, unless they run in containers without a common /dev/shm.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import mmap
import os
import stat
import tempfile
import time
from bisect import bisect_right
from pathlib import Path

from aiexport_edge.shim.limits.window import WINDOW_S, Taken

_LAYOUT, _CAPACITY, _HEAD, _RING = 0, 1, 2, 3  # places in the array of 64-bit numbers
_CURRENT, _MOVED = 1, 2  # values of _LAYOUT; 0 in a file that was never finished
_WINDOW = int(WINDOW_S * 1e9)
_SMALLEST = 64
_NEW = ".new"  # the end of the name of a file that is being made
_MAX_MAPPED = 4096  # rings at a time: the system maps only so many files into a process
_EAGER_ATTEMPTS = 100
_PATIENT_S = 0.001


def shared_directory(state: Path) -> Path:
    """A private directory in memory for what the processes with this state directory share. Raises `OSError`."""
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity = os.stat(state)
    path = parent / f"aiexport-edge-{os.getuid()}-{identity.st_dev:x}-{identity.st_ino:x}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{path} belongs to somebody else; remove it")
    return path


class _Ring:
    """One workspace's file, mapped. Used under the lock alone."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self._file = file
        self._map = mmap.mmap(descriptor, 0)
        self._numbers = memoryview(self._map).cast("q")

    @classmethod
    def open(cls, file: Path, capacity: int) -> _Ring:
        """The ring at `file`, made or made larger as need be."""
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return cls._make(file, capacity, [])
        try:
            old = cls(file, descriptor) if os.fstat(descriptor).st_size else None
        finally:
            os.close(descriptor)
        if old is None or old._numbers[_LAYOUT] == 0:
            return cls._make(file, capacity, [])
        if old.current and old.capacity >= capacity:
            return old
        times = old.times()
        old._numbers[_LAYOUT] = _MOVED  # whoever has it mapped looks for the new one
        return cls._make(file, max(capacity, old.capacity), times)

    @classmethod
    def _make(cls, file: Path, capacity: int, times: list[int]) -> _Ring:
        new = file.with_name(file.name + _NEW)
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            size = 8 * (_RING + capacity)
            os.ftruncate(descriptor, size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, size)  # memory that is not there is an error here, not a crash later
            made = cls(file, descriptor)
        finally:
            os.close(descriptor)
        numbers = made._numbers
        numbers[_CAPACITY], numbers[_HEAD] = capacity, len(times)
        for place, at in enumerate(times):
            numbers[_RING + place] = at
        numbers[_LAYOUT] = _CURRENT
        os.rename(new, file)
        return made

    @property
    def current(self) -> bool:
        return self._numbers[_LAYOUT] == _CURRENT

    @property
    def capacity(self) -> int:
        return self._numbers[_CAPACITY]

    def __len__(self) -> int:
        return min(self._numbers[_HEAD], self.capacity)

    def __getitem__(self, place: int) -> int:
        """The time of the call at `place`, 0 the oldest that is still there."""
        numbers = self._numbers
        head, capacity = numbers[_HEAD], numbers[_CAPACITY]
        return numbers[_RING + (max(0, head - capacity) + place) % capacity]

    def retire(self, oldest: int) -> bool:
        """Whether no call is younger; whoever has the ring mapped then looks for a new one."""
        if len(self) and self[len(self) - 1] > oldest:
            return False
        self._numbers[_LAYOUT] = _MOVED
        return True

    def times(self) -> list[int]:
        return [self[place] for place in range(len(self))]

    def take(self, now: int, limit: int) -> Taken:
        held = len(self)
        if held >= limit:
            free_at = self[held - limit] + _WINDOW
            if free_at > now:
                return Taken(None, 0, (self[held - 1] + _WINDOW - now) / 1e9, (free_at - now) / 1e9)
        self.add(now)
        held = len(self)
        used = held - bisect_right(self, now - _WINDOW)
        return Taken(now, limit - used, WINDOW_S)

    def add(self, now: int) -> None:
        numbers = self._numbers
        numbers[_RING + numbers[_HEAD] % numbers[_CAPACITY]] = now
        numbers[_HEAD] += 1

    def remove(self, mark: int) -> None:
        """Takes one call of that time out; later ones move up."""
        numbers = self._numbers
        head, capacity = numbers[_HEAD], numbers[_CAPACITY]
        call = head - 1
        while call >= max(0, head - capacity) and numbers[_RING + call % capacity] > mark:
            call -= 1
        if call < max(0, head - capacity) or numbers[_RING + call % capacity] != mark:
            return
        for later in range(call, head - 1):
            numbers[_RING + later % capacity] = numbers[_RING + (later + 1) % capacity]
        numbers[_RING + (head - 1) % capacity] = 0  # from now on the oldest place: long ago
        numbers[_HEAD] = head - 1


class SharedWindow:
    """Counts in `directory`, which all processes that share it name alike."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rings: dict[str, _Ring] = {}
        self._open_lock()
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            self._prune()
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    async def take(self, workspace_id: str, limit: int) -> Taken:
        await self._acquire()
        try:
            return self._ring(workspace_id, limit).take(time.monotonic_ns(), limit)
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    async def note(self, workspace_id: str, limit: int) -> int:
        """Counts a call that was let in elsewhere; returns its mark."""
        await self._acquire()
        try:
            now = time.monotonic_ns()
            self._ring(workspace_id, limit).add(now)
            return now
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    async def give_back(self, workspace_id: str, mark: str | int) -> None:
        assert isinstance(mark, int)
        await self._acquire()
        try:
            self._ring(workspace_id, 1).remove(mark)
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    async def close(self) -> None:
        os.close(self._lock)
        self._rings.clear()

    async def _acquire(self) -> None:
        """Never blocks the loop: another process holds the lock for microseconds, or has been put to sleep with it."""
        for attempt in itertools.count():
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(0 if attempt < _EAGER_ATTEMPTS else _PATIENT_S)
                continue
            if self._is_there():
                return
            os.close(self._lock)
            self._open_lock()

    def _open_lock(self) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._inode = os.fstat(self._lock).st_ino
        self._rings.clear()

    def _is_there(self) -> bool:
        """Whether the files are still those that a new process would find: systemd removes what a user has in shared
        memory when the user logs out (`RemoveIPC=`)."""
        try:
            return os.stat(self._directory / "lock").st_ino == self._inode
        except FileNotFoundError:
            return False

    def _ring(self, workspace_id: str, limit: int) -> _Ring:
        """Raises `OSError` where the shared memory is full."""
        ring = self._rings.get(workspace_id)
        if ring is not None and ring.current and ring.capacity >= limit:
            return ring
        if len(self._rings) >= _MAX_MAPPED:
            del self._rings[next(iter(self._rings))]
        file, capacity = self._directory / workspace_id, max(limit, _SMALLEST)
        try:
            ring = _Ring.open(file, capacity)
        except OSError:
            self._prune()
            ring = _Ring.open(file, capacity)
        self._rings[workspace_id] = ring
        return ring

    def _prune(self) -> None:
        """Removes the files in which no call counts any more."""
        oldest = time.monotonic_ns() - _WINDOW
        for file in self._directory.glob("ws_*"):
            if (not file.name.endswith(_NEW) and _Ring.open(file, 1).retire(oldest)) or file.name.endswith(_NEW):
                file.unlink()
