"""Memory that CPU kernels work in holds NaN before every test, so that none relies on what it finds there."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from aiexport_edge.kernels import threads

SCRATCH_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def poisoned_scratch() -> None:
    """All bits set: NaN in every float format, -1 in every integer."""
    ctypes.memset(threads._thread.scratch(SCRATCH_BYTES), 0xFF, SCRATCH_BYTES)


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are shared among three threads, however small they are."""
    before = threads.num_threads()
    monkeypatch.setattr(threads, "MIN_SHARED_NANOSECONDS", 0.0)
    threads.set_num_threads(3)
    yield
    threads.set_num_threads(before)
