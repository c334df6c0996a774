"""Who is in the step that runs now: a small shared memory that outlives the core.

A core that dies leaves the handles of its last step behind; its parent reads them and resubmits those on probation.
Layout, little-endian: uint32 count, then uint64 handle × count. Knows nothing of requests.
"""

from __future__ import annotations

import mmap
import struct

SUSPECTS_BYTES = 64 * 1024
_MAX_SUSPECTS = (SUSPECTS_BYTES - 4) // 8


class Suspects:
    """The core writes, the parent reads. `fd` is a memory file of `SUSPECTS_BYTES`, mapped by both."""

    def __init__(self, fd: int) -> None:
        self._memory = mmap.mmap(fd, SUSPECTS_BYTES)

    def write(self, handles: list[int]) -> None:
        """These are about to run. The count is written last: a reader never sees a handle that is not there yet."""
        assert len(handles) <= _MAX_SUSPECTS
        struct.pack_into(f"<{len(handles)}Q", self._memory, 4, *handles)
        struct.pack_into("<I", self._memory, 0, len(handles))

    def clear(self) -> None:
        """The step is over, nobody is suspected."""
        struct.pack_into("<I", self._memory, 0, 0)

    def read(self) -> list[int]:
        """Who was in the step when the core died; empty when it died between steps."""
        (count,) = struct.unpack_from("<I", self._memory, 0)
        return list(struct.unpack_from(f"<{count}Q", self._memory, 4))

    def close(self) -> None:
        """Unmap the memory; the file descriptor stays the caller's."""
        self._memory.close()
