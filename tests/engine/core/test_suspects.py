"""The shared memory that says who was in the step when a core died."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest

from aiexport_edge.engine.core.suspects import SUSPECTS_BYTES, Suspects


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("suspects")
    os.ftruncate(fd, SUSPECTS_BYTES)
    yield fd
    os.close(fd)


def test_both_sides_see_the_same(fd: int) -> None:
    core, parent = Suspects(fd), Suspects(fd)
    assert parent.read() == []
    core.write([3, 2**64 - 1, 5])
    assert parent.read() == [3, 2**64 - 1, 5]
    core.write([9])
    assert parent.read() == [9]
    core.write([])
    assert parent.read() == []
    core.close()
    parent.close()


def test_the_layout_is_fixed(fd: int) -> None:
    suspects = Suspects(fd)
    suspects.write([1, 2])
    assert os.pread(fd, 20, 0) == struct.pack("<IQQ", 2, 1, 2)
    suspects.close()


def test_it_outlives_a_writer_that_is_killed(fd: int) -> None:
    parent = Suspects(fd)
    code = "import os, sys; from aiexport_edge.engine.core.suspects import Suspects; "
    code += "Suspects(int(sys.argv[1])).write([42]); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(fd)], pass_fds=(fd,), check=False)
    assert parent.read() == [42]
    parent.close()


def test_thousands_fit(fd: int) -> None:
    suspects = Suspects(fd)
    suspects.write(list(range(8191)))
    assert suspects.read() == list(range(8191))
    suspects.close()
