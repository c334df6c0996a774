"""Who is in the steps that run now: a small shared memory that outlives the core.

A core that dies leaves the handles of its last steps behind; its parent reads them and resubmits those on probation.
Layout, little-endian: uint32 count, then uint64 handle × count. Knows nothing of requests.
"""

from __future__ import annotations

import mmap
import struct

SUSPECTS_BYTES = 128 * 1024  # two steps of the most requests that can run
_MAX_SUSPECTS = (SUSPECTS_BYTES - 4) // 8


class Suspects:
    """The core writes, the parent reads. `fd` is a memory file of `SUSPECTS_BYTES`, mapped by both."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SUSPECTS_BYTES)

    def write(self, handles: list[int]) -> None:
        """These are about to run, or run; nobody when nothing does. The count is written last: a reader never sees a
        handle that is not there yet."""
        assert len(handles) <= _MAX_SUSPECTS
        struct.pack_into(f"<{len(handles)}Q", self._memory, 4, *handles)
        struct.pack_into("<I", self._memory, 0, len(handles))

    def read(self) -> list[int]:
        """Who was in a step when the core died; empty when it died between steps."""
        (count,) = struct.unpack_from("<I", self._memory, 0)
        return list(struct.unpack_from(f"<{count}Q", self._memory, 4))

    def close(self) -> None:
        """Unmap the memory; the file descriptor stays the caller's."""
        self._memory.close()
