"""Qwen3-VL in a real core process: replies with pictures outlive their core."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.driver import GREEDY
from support.tiny_models import prompts
from support.tiny_vision import Prompt, greedy_vision, make_vision, picture, prompt, save_vision

from aiexport_edge.engine.backends.base import BackendRequest
from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel, FinishReason, Priority, pack_ids

NUM_TOKENS = 200


class Listener:
    """Notes the ids of a request; `count` and `end` wait."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.outcome: FinishReason | str | None = None
        self._told = asyncio.Event()

    def started(self, cached_tokens: int) -> None:
        pass

    def tokens(self, ids: Sequence[int]) -> None:
        self.ids.extend(ids)
        self._told.set()

    def finished(self, reason: FinishReason) -> None:
        self.outcome = reason
        self._told.set()

    def failed(self, message: str) -> None:
        self.outcome = message
        self._told.set()

    async def until(self, num_ids: int) -> None:
        """Until there are so many ids or the request has ended."""
        while len(self.ids) < num_ids and self.outcome is None:
            self._told.clear()
            await self._told.wait()


def request(given: Prompt) -> BackendRequest:
    return BackendRequest(
        model=0,
        prompt_ids=pack_ids(given.ids),
        output_ids=b"",
        max_tokens=NUM_TOKENS,
        stop_ids=(),
        sampling=GREEDY,
        tenant="t",
        weight=1.0,
        salt=b"",
        priority=Priority.INTERACTIVE,
        images=tuple(given.images),
    )


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_replies_with_pictures_outlive_their_core(name: str, tmp_path: Path) -> None:
    directory = save_vision(name, tmp_path / name)
    hello, question = prompts([7, 12], vocabulary=380)
    given = [
        prompt(hello, picture((12, 8)), question),
        prompt(picture((4, 4)), hello, picture((16, 10)), question),
        prompt(question),
    ]
    config = CoreConfig(
        [CoreModel(name, str(directory), "float32", 512, True, "r")], "cpu", 0, 32 << 20, 8, 64, 1, 0.05
    )

    async def test() -> list[Listener]:
        backend = NativeBackend(config)
        await backend.start()
        try:
            listeners = [Listener() for _ in given]
            for each, listener in zip(given, listeners, strict=True):
                backend.submit(request(each), listener)
            await asyncio.gather(*(listener.until(10) for listener in listeners))
            assert not any(listener.outcome for listener in listeners)
            os.kill(backend.stats().core_pid, signal.SIGKILL)
            for listener in listeners:
                await listener.until(1 << 30)
            assert backend.stats().core_restarts == 1
        finally:
            await backend.stop()
        return listeners

    listeners = asyncio.run(asyncio.wait_for(test(), 120))
    model = make_vision(name)
    for each, listener in zip(given, listeners, strict=True):
        assert listener.outcome is FinishReason.MAX_TOKENS
        assert listener.ids == greedy_vision(model, directory, each, NUM_TOKENS)[0]
