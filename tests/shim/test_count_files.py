"""Counts for which the disk has no room: the worker goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from aiexport_edge.shim.count_files import FIRST_BYTES, CountFile


def counts(file: Path) -> dict[str, float]:
    """As another process reads them."""
    return {key: value for key, value, _, _ in CountFile.read_all_values_from_file(str(file))}  # type: ignore[no-untyped-call]


def fill(file: CountFile, first: int, last: int) -> None:
    for n in range(first, last):
        file.write_value(f"count {n} " + "x" * 200, float(n), 0.0)  # type: ignore[no-untyped-call]


def test_files_have_no_holes(tmp_path: Path) -> None:
    """A hole that is written through a mapping when the disk is full is a SIGBUS."""
    path = tmp_path / "counter_1.db"
    file = CountFile(str(path))
    assert counts(path) == {}
    fill(file, 0, 1000)
    assert path.stat().st_size > FIRST_BYTES
    assert path.stat().st_blocks * 512 >= path.stat().st_size
    assert len(counts(path)) == 1000
    file.close()  # type: ignore[no-untyped-call]
    again = CountFile(str(path))
    assert again.read_value("count 7 " + "x" * 200) == (7.0, 0.0)  # type: ignore[no-untyped-call]
    again.close()  # type: ignore[no-untyped-call]


def test_without_room_counts_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, late = tmp_path / "counter_1.db", tmp_path / "counter_2.db"
    file = CountFile(str(path))
    fill(file, 0, 10)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    fill(file, 10, 1000)
    assert file.read_value("count 3 " + "x" * 200) == (3.0, 0.0)  # type: ignore[no-untyped-call]
    assert file.read_value("count 999 " + "x" * 200) == (999.0, 0.0)  # type: ignore[no-untyped-call]
    assert 10 <= len(counts(path)) < 1000, "others see what there was room for"
    other = CountFile(str(late))
    fill(other, 0, 1000)
    assert other.read_value("count 999 " + "x" * 200) == (999.0, 0.0)  # type: ignore[no-untyped-call]
    assert list(tmp_path.iterdir()) == [path]
    for each in (file, other):
        each.close()  # type: ignore[no-untyped-call]
