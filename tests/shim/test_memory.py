"""Large bodies' memory goes back to the system: when it is asked for, and how often."""

from __future__ import annotations

import asyncio

import pytest

from aiexport_edge.shim import memory
from aiexport_edge.shim.body import LARGE_BYTES, BodyBudget
from aiexport_edge.shim.memory import Trimmer


def test_the_end_of_a_large_body_is_told() -> None:
    told: list[int] = []
    budget = BodyBudget(1 << 30, freed=lambda: told.append(budget.used))
    for size in (1, LARGE_BYTES - 1, LARGE_BYTES, 20 * LARGE_BYTES):
        with budget.lease() as lease:
            lease.grow(size)
            assert len(told) == max(0, [1, LARGE_BYTES - 1, LARGE_BYTES, 20 * LARGE_BYTES].index(size) - 2)
    assert told == [0, 0]


def test_one_trim_for_all_that_ask_within_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []

    async def scenario() -> None:
        trimmed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def trim(pad: int) -> None:
            trims.append(pad)
            loop.call_soon_threadsafe(trimmed.set)

        monkeypatch.setattr(memory, "_function", lambda name: trim)
        monkeypatch.setattr(memory, "TRIM_S", 0.0)
        trimmer = Trimmer()
        for _ in range(3):
            trimmer.soon()
        await trimmed.wait()
        assert trims == [0]
        trimmed.clear()
        trimmer.soon()
        await trimmed.wait()

    asyncio.run(scenario())
    assert trims == [0, 0]


def test_nothing_is_done_where_the_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_function", lambda name: None)
    memory.set_up()
    Trimmer().soon()
