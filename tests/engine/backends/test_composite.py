"""Two backends behind one interface, with real child processes: a scripted core and a scripted worker of vLLM."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.backend_driver import Listener, idle, request, run, state
from support.scripted_core import command as core_command
from support.scripted_core import core_config, undisturbed
from support.scripted_vllm import command as vllm_command
from support.scripted_vllm import worker_config

from aiexport_edge.engine.backends.base import ModelState
from aiexport_edge.engine.backends.composite import CompositeBackend, Part, PartProgress
from aiexport_edge.engine.backends.native import NativeBackend
from aiexport_edge.engine.backends.vllm.launch import VllmBackend
from aiexport_edge.engine.core.protocol import FinishReason


@asynccontextmanager
async def running() -> AsyncIterator[tuple[CompositeBackend, NativeBackend, VllmBackend]]:
    """Models 0 and 2 are native, 1 is vLLM's."""
    native = NativeBackend(core_config(num_models=2), command=core_command("--step-s", 0.002))
    vllm = VllmBackend(worker_config(), command=vllm_command("--step-s", 0.002))
    backend = CompositeBackend([Part(native, [0, 2]), Part(vllm, [1])])
    await backend.start()
    try:
        await state(backend, ModelState.READY)
        yield backend, native, vllm
    finally:
        await backend.stop()


def test_each_request_goes_to_the_backend_of_its_model() -> None:
    async def test() -> None:
        async with running() as (backend, native, vllm):
            assert [status.capacity_tokens for status in backend.statuses()] == [16384, 4096, 16384]
            listeners = [Listener() for _ in range(6)]
            for index, listener in enumerate(listeners):
                backend.submit(request([index], 10 + index, model=index % 3), listener)
            for index, listener in enumerate(listeners):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([index], 10 + index)
            await idle(backend)
            core = backend.stats().core
            own, other = native.stats().core, vllm.stats().core
            assert core is not None
            assert own is not None
            assert other is not None
            assert core.model_output_tokens == [10 + 13, 11 + 14, 12 + 15]
            assert core.model_prompt_tokens == [2, 2, 2]
            assert core.pages_total == core.pages_free + core.pages_cached
            assert core.pages_total * core.page_bytes == sum(s.pages_total * s.page_bytes for s in (own, other))

    run(test())


def test_handles_of_two_backends_are_never_mixed_up() -> None:
    async def test() -> None:
        async with running() as (backend, _, _):
            left, aborted = [Listener(), Listener()], [Listener(), Listener()]
            for model in (0, 1):
                backend.submit(request([model], 60, model=model), left[model])
            gone = [backend.submit(request([7], 4000, model=model), aborted[model]) for model in (0, 1)]
            backend.abort(gone[0])
            backend.finish(gone[1])
            for model, listener in enumerate(left):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([model], 60)
            assert [listener.outcome for listener in aborted] == [None, None]
            await idle(backend)

    run(test())


@pytest.mark.parametrize("victim", [0, 1])
def test_one_may_die_and_the_other_does_not_notice(victim: int) -> None:
    async def test() -> None:
        async with running() as (backend, native, vllm):
            listeners = [Listener() for _ in range(4)]
            for index, listener in enumerate(listeners):
                backend.submit(request([index], 60, model=index % 2), listener)
            await listeners[victim].count(3)
            pids = [native.stats().core_pid, vllm.stats().core_pid]
            os.kill(pids[victim], signal.SIGKILL)
            for index, listener in enumerate(listeners):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([index], 60)
            assert [part.stats().core_restarts for part in (native, vllm)][1 - victim] == 0

    run(test())


def test_progress_is_told_of_the_engines_own_models() -> None:
    told: list[object] = []

    class Watcher:
        def weights(self, model: int, done: int, total: int) -> None:
            told.append(model)

        def warming(self, done: int, total: int) -> None:
            told.append((done, total))

        def over(self) -> None:
            told.append("over")

    progress = PartProgress(Watcher(), [4, 7])
    progress.weights(1, 1, 2)
    progress.warming(1, 3)
    progress.over()
    assert told == [7, (1, 3), "over"]
