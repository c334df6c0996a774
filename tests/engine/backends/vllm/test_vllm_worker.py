"""The vLLM backend with real worker processes around an engine by a rule: workers die and their requests go on."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.backend_driver import Listener, idle, new_core, request, run, state, until
from support.scripted_core import undisturbed
from support.scripted_vllm import NUM_PAGES, TOKENS_PER_PAGE, command, worker_config

from aiexport_edge.engine.backends.base import BackendConstraint, ModelState
from aiexport_edge.engine.backends.vllm.launch import VllmBackend
from aiexport_edge.engine.core.protocol import FinishReason, Priority
from aiexport_edge.engine.structured.compile import ANY_OBJECT
from aiexport_edge.engine.structured.vocabulary import Vocabulary

POISON = 4242


@asynccontextmanager
async def running(*options: object, max_num_running: int = 16, wait: bool = True) -> AsyncIterator[VllmBackend]:
    backend = VllmBackend(worker_config(max_num_running=max_num_running), command=command(*options))
    await backend.start()
    try:
        if wait:
            await state(backend, ModelState.READY)
        yield backend
    finally:
        await backend.stop()


def test_requests_from_start_to_end() -> None:
    """Told in order, ended by budget and by stop ids, resumed by forced ids; ids past an end are nobody's."""

    async def test() -> None:
        async with running() as backend:
            assert backend.statuses()[0].capacity_tokens == NUM_PAGES * TOKENS_PER_PAGE
            listener, stopped, resumed = Listener(), Listener(), Listener()
            backend.submit(request([1, 2, 3], 20, salt=b"ab"), listener)
            assert await listener.end() is FinishReason.MAX_TOKENS
            assert listener.ids == undisturbed([1, 2, 3], 20)
            assert listener.told == ["started", "tokens", "finished"]
            assert listener.cached == 2
            whole = undisturbed([5], 40)
            first = whole.index(whole[17])
            backend.submit(request([5], 40, stop_ids=(whole[17],)), stopped)
            assert await stopped.end() is FinishReason.END_TURN
            assert stopped.ids == whole[: first + 1]
            backend.submit(request([5], 40, output=whole[:15]), resumed)
            assert await resumed.end() is FinishReason.MAX_TOKENS
            assert resumed.ids == whole[15:]
            await idle(backend)
            core = backend.stats().core
            assert core is not None
            assert core.model_prompt_tokens == [5]
            assert core.model_cached_tokens == [2]
            assert core.model_output_tokens == [20 + first + 1 + 25]

    run(test())


def test_a_request_that_the_engine_refuses_fails_alone() -> None:
    async def test() -> None:
        async with running("--refuse", 95) as backend:
            listener, other = Listener(), Listener()
            backend.submit(request([1, 95], 5), listener)
            backend.submit(request([1, 2], 5), other)
            outcome = await listener.end()
            assert isinstance(outcome, str)
            assert "could not go on with this request" in outcome
            assert await other.end() is FinishReason.MAX_TOKENS
            assert backend.stats().core_restarts == 0

    run(test())


@pytest.mark.parametrize("verb", ["abort", "finish"])
def test_after_abort_and_finish_nothing_is_told(verb: str) -> None:
    async def test() -> None:
        async with running("--step-s", 0.002) as backend:
            listener, other = Listener(), Listener()
            handle = backend.submit(request([1], 4000), listener)
            backend.submit(request([2], 30), other)
            await listener.count(5)
            getattr(backend, verb)(handle)
            seen = list(listener.ids)
            assert await other.end() is FinishReason.MAX_TOKENS
            assert (listener.ids, listener.outcome) == (seen, None)
            await idle(backend)
            getattr(backend, verb)(handle)  # has ended: ignored

    run(test())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_requests_outlive_their_worker(number: signal.Signals) -> None:
    """Eight streams, their worker killed: nothing lost, nothing repeated, nothing counted twice."""

    async def test() -> None:
        async with running("--step-s", 0.002, max_num_running=6) as backend:
            listeners = [Listener() for _ in range(8)]
            for index, listener in enumerate(listeners):
                backend.submit(request([index, 7], 40 + index), listener)
            await listeners[3].count(10)
            pid = backend.stats().core_pid
            os.kill(pid, number)
            late = Listener()
            backend.submit(request([99], 5), late)
            await new_core(backend, pid)
            for index, listener in enumerate(listeners):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([index, 7], 40 + index)
                assert listener.told.count("started") == 1
            assert await late.end() is FinishReason.MAX_TOKENS
            assert late.ids == undisturbed([99], 5)
            assert backend.stats().core_restarts == 1

    run(test())


@pytest.mark.parametrize("manner", ["kill", "break"])
def test_requests_outlive_the_engine_behind_their_worker(manner: str, tmp_path: Path) -> None:
    """The worker ends as its engine has ended, so that a kill counts as a kill."""

    async def test() -> None:
        broken = tmp_path / "broken"
        async with running("--step-s", 0.002, "--break", broken) as backend:
            listeners = [Listener() for _ in range(8)]
            for index, listener in enumerate(listeners):
                backend.submit(request([index, 7], 60), listener)
            await listeners[3].count(10)
            broken.write_text(manner)
            for index, listener in enumerate(listeners):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([index, 7], 60)
            assert backend.stats().core_restarts == 1
            assert not broken.exists()

    run(test())


def test_a_poison_request_takes_only_itself_down() -> None:
    async def test() -> None:
        async with running("--step-s", 0.002, "--poison", POISON) as backend:
            listeners = [Listener() for _ in range(6)]
            for index, listener in enumerate(listeners):
                backend.submit(request([index], 30), listener)
            await listeners[0].count(3)
            poison = Listener()
            backend.submit(request([1, POISON, 2], 10), poison)
            outcome = await poison.end()
            assert isinstance(outcome, str)
            assert "given up" in outcome
            for index, listener in enumerate(listeners):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([index], 30)
            assert backend.stats().core_restarts == 2

    run(test())


def test_interactive_requests_take_the_place_of_batch_requests() -> None:
    """A batch request that is taken back goes on where it was when there is room again."""

    async def test() -> None:
        async with running("--step-s", 0.002, max_num_running=2) as backend:
            batch = [Listener(), Listener()]
            for index, listener in enumerate(batch):
                backend.submit(request([index], 4000, priority=Priority.BATCH), listener)
            await batch[0].count(3)
            await batch[1].count(3)
            interactive = Listener()
            backend.submit(request([9], 20), interactive)
            assert await interactive.end() is FinishReason.MAX_TOKENS
            for index, listener in enumerate(batch):
                await listener.count(len(listener.ids) + 10)
                assert listener.ids == undisturbed([index], len(listener.ids))
                assert listener.told.count("started") == 1
            await until(lambda: (core := backend.stats().core) is not None and core.preemptions == 1)

    run(test())


VOCABULARY = Vocabulary([bytes([32 + id_]) for id_ in range(95)] + [b""], [95], 96)
DOCUMENT = BackendConstraint(ANY_OBJECT, b"", VOCABULARY)


def test_a_document_that_is_aborted_while_its_grammar_is_prepared_never_runs() -> None:
    async def test() -> None:
        async with running("--announce-s", 0.3) as backend:
            gone, other = Listener(), Listener()
            handle = backend.submit(request([1], 10, stop_ids=(95,), constraint=DOCUMENT), gone)
            backend.submit(request([2], 10, stop_ids=(95,), constraint=DOCUMENT), other)
            await asyncio.sleep(0.1)
            backend.abort(handle)
            assert await other.end() is FinishReason.MAX_TOKENS
            assert (gone.told, gone.outcome) == ([], None)
            await idle(backend)
            core = backend.stats().core
            assert core is not None
            assert core.model_prompt_tokens == [1]

    run(test())


def test_a_document_is_whole_though_nothing_is_masked() -> None:
    """The engine draws what it likes: whatever that is, the document closes within its budget."""

    async def test() -> None:
        async with running() as backend:
            listeners = [Listener() for _ in range(4)]
            for index, listener in enumerate(listeners):
                backend.submit(request([index], 10, stop_ids=(95,), constraint=DOCUMENT), listener)
            for listener in listeners:
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert b"".join(VOCABULARY.bytes_of(id_) for id_ in listener.ids).strip() == b"{}"

    run(test())


def test_a_model_that_cannot_be_served_says_why(tmp_path: Path) -> None:
    async def test() -> None:
        reason = tmp_path / "reason"
        reason.write_text("vLLM cannot serve model m0: no such thing")
        async with running("--fail-load", reason, wait=False) as backend:
            await state(backend, ModelState.FAILED)
            assert backend.statuses()[0].message == reason.read_text()

    run(test())


def test_an_interpreter_without_vllm_says_so() -> None:
    """The real worker, where vLLM is not installed; skipped where it is."""
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed beside these tests")

    async def test() -> None:
        backend = VllmBackend(worker_config())
        await backend.start()
        try:
            await state(backend, ModelState.FAILED)
            assert "vLLM is not installed where" in backend.statuses()[0].message
        finally:
            await backend.stop()

    run(test())


def test_a_worker_ends_with_its_backend() -> None:
    async def test() -> None:
        async with running() as backend:
            pid = backend.stats().core_pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        await until(lambda: backend.stats().core_pid == 0)

    run(test())
