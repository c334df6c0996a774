"""The native backend with real child processes: cores die and their requests go on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.backend_driver import Listener, idle, new_core, request, run, state, until
from support.scripted_core import command, core_config, undisturbed

from aiexport_edge.engine.backends.base import ModelState
from aiexport_edge.engine.backends.native import MAX_KILLS, STEP_TIMEOUT_S, NativeBackend
from aiexport_edge.engine.core.protocol import FinishReason

POISON = 4242


@asynccontextmanager
async def running(
    *options: object, wait: bool = True, step_timeout_s: float = STEP_TIMEOUT_S
) -> AsyncIterator[NativeBackend]:
    backend = NativeBackend(core_config(), command=command(*options), step_timeout_s=step_timeout_s)
    await backend.start()
    try:
        if wait:
            await state(backend, ModelState.READY)
        yield backend
    finally:
        await backend.stop()


def counters(backend: NativeBackend) -> tuple[int, int, int]:
    """Steps, prompt tokens and output tokens of all cores."""
    core = backend.stats().core
    assert core is not None
    return core.steps, core.model_prompt_tokens[0], core.model_output_tokens[0]


def test_a_request_from_start_to_end() -> None:
    async def test() -> None:
        async with running() as backend:
            prompt, listener = [1, 2, 3], Listener()
            backend.submit(request(prompt, 20), listener)
            assert await listener.end() is FinishReason.MAX_TOKENS
            assert listener.ids == undisturbed(prompt, 20)
            assert listener.told == ["started", "tokens", "finished"]
            assert backend.statuses()[0].capacity_tokens == 4096 * 4

    run(test())


def test_stop_ids_and_forced_output() -> None:
    async def test() -> None:
        async with running() as backend:
            whole = undisturbed([5], 40)
            stop = whole[17]
            first = whole.index(stop)
            listener, resumed = Listener(), Listener()
            backend.submit(request([5], 40, stop_ids=(stop,)), listener)
            assert await listener.end() is FinishReason.END_TURN
            assert listener.ids == whole[: first + 1]
            backend.submit(request([5], 40, output=whole[:15]), resumed)
            assert await resumed.end() is FinishReason.MAX_TOKENS
            assert resumed.ids == whole[15:]

    run(test())


def test_a_request_whose_logits_are_not_numbers_is_failed_and_others_are_not() -> None:
    async def test() -> None:
        async with running("--broken", 95) as backend:
            listener, other = Listener(), Listener()
            backend.submit(request([1, 95], 5), listener)
            backend.submit(request([1, 2], 5), other)
            message = await listener.end()
            assert isinstance(message, str)
            assert "Model m0 answered with what is not a number" in message
            assert listener.told == ["started", "failed"]
            assert await other.end() is FinishReason.MAX_TOKENS
            assert backend.stats().core_restarts == 0

    run(test())


@pytest.mark.parametrize("verb", ["abort", "finish"])
def test_after_abort_and_finish_nothing_is_told_and_pages_are_free(verb: str) -> None:
    async def test() -> None:
        async with running("--step-s", 0.002) as backend:
            listener, other = Listener(), Listener()
            handle = backend.submit(request([1], 4000), listener)
            backend.submit(request([2], 50), other)
            await listener.count(5)
            getattr(backend, verb)(handle)
            seen = list(listener.ids)
            assert await other.end() is FinishReason.MAX_TOKENS
            assert other.ids == undisturbed([2], 50)
            assert listener.ids == seen
            assert listener.outcome is None
            await idle(backend)
            getattr(backend, verb)(handle)  # has ended: ignored

    run(test())


class Watcher:
    """Notes what it is told of starts."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def weights(self, model: int, done: int, total: int) -> None:
        self.told.append(f"{model}: {done}/{total}")

    def warming(self, done: int, total: int) -> None:
        self.told.append(f"{done}/{total}")

    def over(self) -> None:
        self.told.append("over")


def test_whoever_watches_a_start_is_told_how_far_it_is() -> None:
    async def test() -> None:
        watcher = Watcher()
        backend = NativeBackend(core_config(), command=command(), progress=watcher)
        await backend.start()
        try:
            await state(backend, ModelState.READY)
            assert watcher.told == ["0: 1/2", "3/4", "over"]
        finally:
            await backend.stop()

    run(test())


def test_a_core_that_hangs_is_ended_and_its_requests_go_on() -> None:
    """Stopped, it is alive and silent, as it is when a card never answers."""

    async def test() -> None:
        async with running("--step-s", 0.003, step_timeout_s=2.0) as backend:
            listeners = [Listener() for _ in range(4)]
            for index, listener in enumerate(listeners):
                backend.submit(request([index, 7], 400), listener)
            await listeners[3].count(10)
            pid = backend.stats().core_pid
            os.kill(pid, signal.SIGSTOP)
            for index, listener in enumerate(listeners):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([index, 7], 400)
            assert backend.stats().core_pid != pid
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    run(test())


def test_an_idle_core_is_silent_and_lives() -> None:
    async def test() -> None:
        async with running(step_timeout_s=0.05) as backend:
            pid = backend.stats().core_pid
            await asyncio.sleep(0.3)
            assert backend.stats().core_pid == pid
            assert backend.stats().core_restarts == 0

    run(test())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_requests_outlive_their_core(number: signal.Signals) -> None:
    async def test() -> None:
        async with running("--step-s", 0.003) as backend:
            listeners = [Listener() for _ in range(8)]
            for index, listener in enumerate(listeners):
                backend.submit(request([index, 7], 40 + index), listener)
            await listeners[3].count(10)
            await until(lambda: counters(backend)[0] >= 5)
            pid, before = backend.stats().core_pid, counters(backend)
            os.kill(pid, number)
            late = Listener()
            backend.submit(request([99], 5), late)  # to a core that is no more
            assert await new_core(backend, pid) != pid
            for index, listener in enumerate(listeners):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([index, 7], 40 + index)
                assert listener.told.count("started") == 1
            assert await late.end() is FinishReason.MAX_TOKENS
            assert late.ids == undisturbed([99], 5)
            assert backend.stats().core_restarts == 1
            # Counters go on over the lives of cores.
            await idle(backend)
            assert all(now > then for now, then in zip(counters(backend), before, strict=True))

    run(test())


def test_kills_from_outside_fail_nobody() -> None:
    """Killed again and again in the very step of a request that has not had a token since: still it is not at fault."""

    async def test() -> None:
        async with running("--step-s", 0.4) as backend:
            listeners = [Listener(), Listener()]
            for index, listener in enumerate(listeners):
                backend.submit(request([index], 3), listener)
            pid = backend.stats().core_pid
            for _ in range(MAX_KILLS - 1):
                core = backend._core
                assert core is not None
                await until(lambda core=core: bool(core.in_step()))  # type: ignore[misc]
                os.kill(pid, signal.SIGKILL)
                pid = await new_core(backend, pid)
            for index, listener in enumerate(listeners):
                assert await listener.end() is FinishReason.MAX_TOKENS
                assert listener.ids == undisturbed([index], 3)

    run(test())


def test_a_poison_request_takes_only_itself_down() -> None:
    async def test() -> None:
        async with running("--step-s", 0.003, "--poison", POISON) as backend:
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


def test_a_model_that_cannot_be_loaded_at_the_start(tmp_path: Path) -> None:
    async def test() -> None:
        reason = tmp_path / "reason"
        reason.write_text("the disk is full of cats; remove some.")
        async with running("--fail-load", reason, wait=False) as backend:
            await state(backend, ModelState.FAILED)
            assert "full of cats" in backend.statuses()[0].message
            assert backend.stats().core_pid == 0
            assert backend.stats().core_restarts == 0

    run(test())


def test_a_model_that_cannot_be_loaded_again_is_tried_until_it_can(tmp_path: Path) -> None:
    async def test() -> None:
        reason = tmp_path / "reason"
        async with running("--fail-load", reason, "--step-s", 0.003) as backend:
            listener = Listener()
            backend.submit(request([1], 50), listener)
            await listener.count(5)
            reason.write_text("no memory just now.")
            os.kill(backend.stats().core_pid, signal.SIGKILL)
            await state(backend, ModelState.FAILED)
            assert "no memory" in backend.statuses()[0].message
            reason.unlink()
            await state(backend, ModelState.READY)
            assert await listener.end() is FinishReason.MAX_TOKENS
            assert listener.ids == undisturbed([1], 50)

    run(test())


def test_what_no_longer_fits_a_smaller_pool_is_failed_and_the_others_go_on(tmp_path: Path) -> None:
    """The next core's pool holds 20 tokens: a request for 1 + 100 would end core after core if it were sent there."""

    async def test() -> None:
        pages = tmp_path / "pages"
        async with running("--pages", pages, "--step-s", 0.003) as backend:
            large, small = Listener(), Listener()
            backend.submit(request([1], 100), large)
            await large.count(5)
            pages.write_text("6")
            os.kill(backend.stats().core_pid, signal.SIGKILL)
            backend.submit(request([2], 10), small)
            assert "room for 20 tokens" in str(await large.end())
            assert await small.end() is FinishReason.MAX_TOKENS
            assert small.ids == undisturbed([2], 10)
            assert backend.stats().core_restarts == 1

    run(test())


def test_a_core_killed_while_it_loads_is_started_again() -> None:
    async def test() -> None:
        async with running("--load-s", 0.3, wait=False) as backend:
            await until(lambda: backend.stats().core_pid > 0)
            pid = backend.stats().core_pid
            listener = Listener()
            backend.submit(request([3], 5), listener)
            os.kill(pid, signal.SIGKILL)
            assert await listener.end() is FinishReason.MAX_TOKENS
            assert listener.ids == undisturbed([3], 5)
            assert backend.stats().core_restarts == 1

    run(test())


HALF_A_WORD = """
import argparse, socket, sys
from aiexport_edge.engine.core.protocol import *
parser = argparse.ArgumentParser()
parser.add_argument("--fd", type=int)
parser.add_argument("--shared-fd", type=int)
sock = socket.socket(fileno=parser.parse_args().fd)
def receive():
    header = sock.recv(4, socket.MSG_WAITALL)
    return sock.recv(HEADER.unpack(header)[0], socket.MSG_WAITALL)
receive()
zero = CoreStats(*[0] * 9, [0], [0], [0], [0], [0])
sock.sendall(encode_from_core(Ready([ModelReady(0, 1, 0, 100)], zero)))
for add in decode_to_core(receive()):
    ids = [9] * add.max_tokens if not add.stop_ids else [8, *add.stop_ids]
    sock.sendall(encode_from_core(StepReport([Started(add.handle, 0)], [Tokens(add.handle, ids)], [])))
sys.exit(3)
"""


def test_a_reply_whose_end_was_not_told_ends(tmp_path: Path) -> None:
    """The core dies between a request's last token and the word that it has finished: no core needs to run it again."""
    script = tmp_path / "half_a_word.py"
    script.write_text(HALF_A_WORD)

    async def test() -> None:
        backend = NativeBackend(core_config(), command=(sys.executable, str(script)))
        await backend.start()
        try:
            by_length, by_stop = Listener(), Listener()
            backend.submit(request([1], 3), by_length)
            backend.submit(request([1], 30, stop_ids=(5,)), by_stop)
            assert await by_length.end() is FinishReason.MAX_TOKENS
            assert by_length.ids == [9, 9, 9]
            assert await by_stop.end() is FinishReason.END_TURN
            assert by_stop.ids == [8, 5]
        finally:
            await backend.stop()

    run(test())


def test_requests_that_end_cores_between_steps_are_given_up(tmp_path: Path) -> None:
    """Nobody was in a step, so nobody is suspected; but it must not go on for ever."""
    script = tmp_path / "dies_of_any_request.py"
    script.write_text(
        HALF_A_WORD.replace("for add in decode_to_core(receive()):", "receive(); sys.exit(3)\nfor add in []:")
    )

    async def test() -> None:
        backend = NativeBackend(core_config(), command=(sys.executable, str(script)))
        await backend.start()
        try:
            listener = Listener()
            backend.submit(request([1], 3), listener)
            assert "given up" in str(await listener.end())
            await state(backend, ModelState.READY)
            assert backend.stats().core_restarts == 3
        finally:
            await backend.stop()

    run(test())


def test_the_core_ends_with_its_backend() -> None:
    async def test() -> None:
        async with running() as backend:
            pid = backend.stats().core_pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    run(test())
