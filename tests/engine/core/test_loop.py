"""The loop with a real socket pair and a runner that can be held in its step: steps one by one, and overlapping."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from support.fake_core import FakeRunner, FakeStep, add_request, undisturbed

from aiexport_edge.engine.core.channel import Channel
from aiexport_edge.engine.core.loop import StepLoop
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.plan import StepPlan
from aiexport_edge.engine.core.protocol import (
    HEADER,
    AbortRequest,
    AddRequest,
    CoreStats,
    Finished,
    FinishReason,
    FinishRequest,
    Shutdown,
    StepReport,
    ToCore,
    decode_from_core,
    encode_to_core,
)
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.suspects import SUSPECTS_BYTES, Suspects


class HeldRunner(FakeRunner):
    """Calls `before_step` first."""

    before_step: Callable[[StepPlan], None] = staticmethod(lambda plan: None)

    def launch(self, plan: StepPlan) -> FakeStep:
        self.before_step(plan)
        return super().launch(plan)


@dataclass
class Parent:
    """The other side of a loop that runs in a thread."""

    connection: socket.socket
    core_connection: socket.socket
    suspects: Suspects
    runner: HeldRunner
    scheduler: Scheduler
    thread: threading.Thread
    reports: list[StepReport] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def send(self, *messages: ToCore) -> None:
        self.connection.sendall(encode_to_core(list(messages)))

    def report(self) -> StepReport:
        """The next report."""
        size = HEADER.unpack(self._read(HEADER.size))[0]
        report = decode_from_core(self._read(size))
        assert isinstance(report, StepReport)
        self.reports.append(report)
        return report

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.report()

    def finished(self) -> dict[int, int]:
        return {f.handle: f.reason for report in self.reports for f in report.finished}

    def ids(self, handle: int) -> list[int]:
        return [i for report in self.reports for t in report.tokens if t.handle == handle for i in t.ids]

    def stats(self) -> CoreStats:
        return next(report.stats for report in reversed(self.reports) if report.stats is not None)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.connection.recv(size - len(data))
            assert piece, "the loop has ended"
            data += piece
        return data


@pytest.fixture(params=[False, True], ids=["one-by-one", "overlapping"])
def parent(request: pytest.FixtureRequest) -> Iterator[Parent]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    fd = os.memfd_create("suspects")
    os.ftruncate(fd, SUSPECTS_BYTES)
    pool = PagePool(65)
    runner = HeldRunner(num_pages=65, tokens_per_page=[4, 3], pool=pool, overlaps=request.param)
    scheduler = Scheduler(
        pool,
        revisions=["r", "s"],
        tokens_per_page=[4, 3],
        max_num_running=4,
        max_step_tokens=16,
        batch_floor_share=0.1,
    )
    loop = StepLoop(channel=Channel(theirs), scheduler=scheduler, runner=runner, suspects=Suspects(fd))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except BaseException as error:
            errors.append(error)
        finally:
            theirs.close()

    thread = threading.Thread(target=run)
    parent = Parent(ours, theirs, Suspects(fd), runner, scheduler, thread, errors=errors)
    thread.start()
    yield parent
    ours.close()
    thread.join()
    parent.suspects.close()
    os.close(fd)


def check_output(parent: Parent, message: AddRequest) -> None:
    output, reason = undisturbed(message)
    assert parent.ids(message.handle) == output
    assert parent.finished()[message.handle] == reason


def test_requests_run_to_their_end(parent: Parent) -> None:
    messages = [add_request(h, [h, h + 1, h + 2], model=h % 2, max_tokens=5 + h, stop_ids=[7]) for h in range(9)]
    parent.send(*messages)
    parent.until(lambda: len(parent.finished()) == 9)
    for message in messages:
        check_output(parent, message)
    assert sorted(s.handle for report in parent.reports for s in report.started) == list(range(9))
    stats = parent.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0), "told when it goes idle"
    assert stats.pages_free + stats.pages_cached == stats.pages_total == 64
    assert sum(stats.model_prompt_tokens) == 27
    assert sum(stats.model_output_tokens) == sum(len(undisturbed(message)[0]) for message in messages)
    assert not parent.suspects.read()


def test_an_abort_is_answered_and_frees_pages_when_no_step_uses_them(parent: Parent) -> None:
    in_step, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def hold(plan: StepPlan) -> None:
        in_step.release()
        go_on.acquire()

    parent.runner.before_step = hold
    parent.send(add_request(1, [1] * 12, max_tokens=200), add_request(2, [2] * 3, max_tokens=5))
    for _ in range(2):
        in_step.acquire()
        go_on.release()
    in_step.acquire()  # the third step runs
    parent.send(AbortRequest(1))
    go_on.release()
    in_step.acquire()  # the fourth has been planned: the abort was taken before it
    assert 1 not in parent.scheduler.requests
    if parent.runner.overlaps:
        assert parent.scheduler.pool.num_used == 4 + 2, "the third step has not been collected, and may write to them"
        go_on.release()
        in_step.acquire()
    assert parent.scheduler.pool.num_used == 2
    parent.runner.before_step = lambda plan: None
    go_on.release()
    parent.until(lambda: len(parent.finished()) == 2)
    assert parent.finished()[1] == FinishReason.ABORTED
    assert len(parent.ids(1)) < 10


def test_aborting_the_only_request_is_answered_without_a_step(parent: Parent) -> None:
    parent.send(add_request(1, [1] * 3, max_tokens=200))
    parent.until(lambda: bool(parent.ids(1)))
    parent.send(AbortRequest(1))
    parent.until(lambda: 1 in parent.finished())
    assert parent.stats().pages_used == 0


def test_added_and_aborted_in_one_frame(parent: Parent) -> None:
    parent.send(add_request(1, [1] * 3), AbortRequest(1))
    assert parent.report().finished == [Finished(1, FinishReason.ABORTED)]


def test_finish_is_not_answered(parent: Parent) -> None:
    in_step, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def hold(plan: StepPlan) -> None:
        in_step.release()
        go_on.acquire()

    parent.runner.before_step = hold
    parent.send(add_request(1, [1] * 3, max_tokens=200), add_request(2, [2] * 3, max_tokens=4))
    in_step.acquire()
    parent.send(FinishRequest(1))  # while its first step runs: it can't have ended by itself before this is read
    parent.runner.before_step = lambda plan: None
    go_on.release()
    parent.until(lambda: 2 in parent.finished() and parent.stats().pages_used == 0)
    assert 1 not in parent.finished()


def test_messages_about_what_has_ended_are_ignored(parent: Parent) -> None:
    parent.send(AbortRequest(99), FinishRequest(98), add_request(1, [1], max_tokens=1))
    parent.until(lambda: bool(parent.finished()))
    parent.send(AbortRequest(1), FinishRequest(1))
    parent.send(add_request(2, [2], max_tokens=1))
    parent.until(lambda: 2 in parent.finished())
    assert parent.finished() == {1: FinishReason.MAX_TOKENS, 2: FinishReason.MAX_TOKENS}


def test_forced_ids_that_have_ended_a_request_are_answered_at_once(parent: Parent) -> None:
    parent.send(
        add_request(1, [1], output=[5, 6], max_tokens=2),
        add_request(2, [1], output=[5, 7], max_tokens=9, stop_ids=[7]),
    )
    report = parent.report()
    assert report.finished == [Finished(1, FinishReason.MAX_TOKENS), Finished(2, FinishReason.END_TURN)]
    assert report.tokens == []
    assert report.stats is not None
    assert report.stats.steps == 0


def test_suspects_are_those_in_steps_that_run(parent: Parent) -> None:
    seen: list[list[int]] = []
    parent.runner.before_step = lambda plan: seen.append(sorted(parent.suspects.read()))
    parent.send(add_request(1, [1], max_tokens=3), add_request(2, [2], max_tokens=2))
    parent.until(lambda: len(parent.finished()) == 2)
    assert seen == [[1, 2], [1, 2], [1, 2] if parent.runner.overlaps else [1]]
    assert parent.suspects.read() == []


def test_a_bug_in_the_runner_ends_the_loop_and_leaves_its_suspects(parent: Parent) -> None:
    def fail(plan: StepPlan) -> None:
        raise RuntimeError("device lost")

    parent.runner.before_step = fail
    parent.send(add_request(1, [1]), add_request(2, [2]))
    parent.thread.join()
    assert [str(error) for error in parent.errors] == ["device lost"]
    assert sorted(parent.suspects.read()) == [1, 2]


def test_a_request_that_cannot_even_be_added_is_a_suspect(parent: Parent) -> None:
    parent.send(add_request(5, [1], max_tokens=100_000))
    parent.thread.join()
    assert parent.errors
    assert parent.suspects.read() == [5]


def test_a_parent_that_does_not_read_stops_nobody(parent: Parent) -> None:
    parent.core_connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the least that the system has
    messages = [add_request(handle, [handle, 1], max_tokens=20) for handle in range(60)]
    steps = threading.Semaphore(0)
    parent.runner.before_step = lambda plan: steps.release()
    parent.send(*messages)
    for _ in range(300):  # every step that there is
        steps.acquire()
    parent.until(lambda: len(parent.finished()) == 60)
    for message in messages:
        check_output(parent, message)


def test_it_ends_with_its_parent(parent: Parent) -> None:
    parent.send(add_request(1, [1], max_tokens=200))
    parent.connection.close()
    parent.thread.join()
    assert parent.errors == []


def test_it_ends_when_idle_and_the_parent_leaves(parent: Parent) -> None:
    parent.connection.close()
    parent.thread.join()
    assert parent.errors == []


def test_shutdown_ends_it(parent: Parent) -> None:
    parent.send(add_request(1, [1], max_tokens=200), Shutdown())
    parent.thread.join()
    assert parent.errors == []
    assert parent.connection.recv(1) == b""


def test_idle_it_sleeps(parent: Parent) -> None:
    """No report without a reason: an idle core wakes nobody."""
    parent.send(add_request(1, [1], max_tokens=1))
    parent.until(lambda: bool(parent.finished()))
    parent.connection.settimeout(0.3)
    with pytest.raises(TimeoutError):
        parent.connection.recv(1)
