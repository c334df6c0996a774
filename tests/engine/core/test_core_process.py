"""The core as a real process over its socket, with the real runner and a small Llama; and every way that it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from support.fake_core import add_request
from support.tiny_models import VOCABULARY, greedy, make, prompts, save

from aiexport_edge.engine.core.process import EXIT_BUG, EXIT_LOAD_FAILED
from aiexport_edge.engine.core.protocol import (
    HEADER,
    AbortRequest,
    CoreConfig,
    CoreModel,
    CoreStats,
    FinishReason,
    FromCore,
    LoadFailed,
    Loading,
    Ready,
    Shutdown,
    StepReport,
    ToCore,
    decode_from_core,
    encode_config,
    encode_to_core,
)
from aiexport_edge.engine.core.suspects import SUSPECTS_BYTES, Suspects
from aiexport_edge.proto.lifetime import PARENT_PID

COMMAND = [sys.executable, "-m", "aiexport_edge.engine.core.process"]
PAGES = 40


@dataclass
class Core:
    """A core process and its parent's end of the socket."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    suspects: Suspects
    messages: list[FromCore] = field(default_factory=list)

    def send(self, *messages: ToCore) -> None:
        self.socket.sendall(encode_to_core(list(messages)))

    def receive(self) -> FromCore | None:
        """The next message; None at the end of the stream."""
        header = self._read(HEADER.size)
        if header is None:
            return None
        body = self._read(HEADER.unpack(header)[0])
        assert body is not None
        self.messages.append(decode_from_core(body))
        return self.messages[-1]

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.receive() is not None, "the core has ended"

    def of(self, kind: type) -> list[FromCore]:
        return [message for message in self.messages if isinstance(message, kind)]

    def reports(self) -> list[StepReport]:
        return [message for message in self.messages if isinstance(message, StepReport)]

    def ids(self, handle: int) -> list[int]:
        return [i for report in self.reports() for t in report.tokens if t.handle == handle for i in t.ids]

    def finished(self) -> dict[int, int]:
        return {f.handle: f.reason for report in self.reports() for f in report.finished}

    def stats(self) -> CoreStats:
        return next(report.stats for report in reversed(self.reports()) if report.stats is not None)

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                return None
            data += piece
        return data


def config_of(directory: Path, *, pool_bytes: int = 0) -> CoreConfig:
    # Llama of support.tiny_models: 3 layers, 2 heads of 8 for keys and for values, 4 bytes each.
    page_bytes = 4 * 3 * 2 * 2 * 8 * 4
    model = CoreModel(
        name="tiny",
        path=str(directory),
        dtype="float32",
        context_window=128,
        deterministic=True,
        revision="r",
    )
    return CoreConfig(
        models=[model],
        device="cpu",
        page_bytes=page_bytes,
        pool_bytes=pool_bytes or page_bytes * (PAGES + 1),
        max_num_running=8,
        max_step_tokens=32,
        num_threads=1,
        batch_floor_share=0.1,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama3", tmp_path_factory.mktemp("models") / "tiny")


@contextlib.contextmanager
def spawned(stderr: int | None = None) -> Iterator[Core]:
    ours, theirs = socket.socketpair()
    ours.settimeout(120)
    fd = os.memfd_create("suspects")
    os.ftruncate(fd, SUSPECTS_BYTES)
    process = subprocess.Popen(
        [*COMMAND, "--fd", str(theirs.fileno()), "--shared-fd", str(fd)],
        pass_fds=(theirs.fileno(), fd),
        env={**os.environ, PARENT_PID: str(os.getpid())},
        stderr=stderr,
    )
    theirs.close()
    suspects = Suspects(fd)
    os.close(fd)
    try:
        yield Core(process, ours, suspects)
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        ours.close()
        suspects.close()


@pytest.fixture
def core(directory: Path) -> Iterator[Core]:
    with spawned() as core:
        core.socket.sendall(encode_config(config_of(directory)))
        core.until(lambda: bool(core.of(Ready)))
        yield core


def test_a_life(core: Core) -> None:
    """What it says of itself, what it generates, what is left afterwards, and a clean end."""
    loading = [message for message in core.messages if isinstance(message, Loading)]
    assert loading
    assert loading[-1].done == loading[-1].total > 0
    (ready,) = [message for message in core.messages if isinstance(message, Ready)]
    (model,) = ready.models
    assert (model.model, model.tokens_per_page, model.capacity_tokens) == (0, 4, 4 * PAGES)
    assert model.weight_bytes > 0
    assert ready.stats.pages_free == ready.stats.pages_total == PAGES
    assert psutil.Process(core.process.pid).name() == "aiexport-core"

    reference = make("llama3")
    texts = prompts([3, 17, 40, 90], VOCABULARY)
    expected = [greedy(reference, text, 12)[0] for text in texts]
    core.send(*[add_request(handle, text, max_tokens=12) for handle, text in enumerate(texts)])
    core.send(add_request(9, texts[1], max_tokens=12, stop_ids=[expected[1][5]], tenant="another"))
    core.send(add_request(10, texts[2], output=expected[2][:7], max_tokens=12, probation=True))
    core.until(lambda: len(core.finished()) == 6)
    for handle in range(4):
        assert core.ids(handle) == expected[handle]
        assert core.finished()[handle] == FinishReason.MAX_TOKENS
    stop = expected[1].index(expected[1][5])
    assert core.ids(9) == expected[1][: stop + 1]
    assert core.finished()[9] == FinishReason.END_TURN
    assert core.ids(10) == expected[2][7:]
    core.until(lambda: core.stats().running == 0)
    assert core.stats().pages_used == 0
    assert core.stats().pages_cached > 0
    assert core.suspects.read() == []

    core.send(Shutdown())
    assert core.receive() is None
    assert core.process.wait(60) == 0


def test_an_abort_gives_pages_back(core: Core) -> None:
    core.send(add_request(0, prompts([20], VOCABULARY)[0], max_tokens=100))
    core.send(add_request(1, prompts([11, 21], VOCABULARY)[1], max_tokens=100))
    core.until(lambda: len(core.ids(0)) > 3 and len(core.ids(1)) > 3)
    core.send(AbortRequest(0), AbortRequest(1))
    core.until(lambda: len(core.finished()) == 2)
    assert set(core.finished().values()) == {FinishReason.ABORTED}
    assert core.stats().pages_used == 0, "in the very report that answers the abort"
    assert len(core.ids(0)) < 100


def test_it_ends_when_its_parent_closes_the_socket(core: Core) -> None:
    core.send(add_request(0, [5], max_tokens=100))
    core.socket.close()
    assert core.process.wait(60) == 0


def test_it_ends_before_it_was_told_anything() -> None:
    with spawned() as core:
        core.socket.close()
        assert core.process.wait(60) == 0


def test_only_the_parent_decides_about_its_end(core: Core) -> None:
    core.process.send_signal(signal.SIGINT)
    core.process.send_signal(signal.SIGTERM)
    core.send(add_request(0, [5], max_tokens=3))
    core.until(lambda: bool(core.finished()))
    assert core.process.poll() is None


def test_a_bug_ends_it_with_a_traceback(directory: Path) -> None:
    with spawned(stderr=subprocess.PIPE) as core:
        core.socket.sendall(encode_config(config_of(directory)))
        core.until(lambda: bool(core.of(Ready)))
        core.send(add_request(7, [VOCABULARY + 10_000], max_tokens=3))  # an id that no embedding has
        assert core.process.wait(60) == EXIT_BUG == 70
        assert core.process.stderr is not None
        assert b"Traceback" in core.process.stderr.read()
        assert core.suspects.read() == [7]


def test_kill_leaves_the_suspects_of_the_running_step(core: Core) -> None:
    """Killed at any moment: who is named was running, and nobody else."""
    core.send(*[add_request(handle, [5 + handle], max_tokens=100) for handle in range(4)])
    core.until(lambda: bool(core.ids(3)))
    core.process.kill()
    core.process.wait()
    assert set(core.suspects.read()) <= set(range(4))


@pytest.mark.parametrize("what", ["missing", "pool"])
def test_what_cannot_be_loaded_is_told_to_the_parent(directory: Path, tmp_path: Path, what: str) -> None:
    config = config_of(tmp_path / "nowhere") if what == "missing" else config_of(directory, pool_bytes=1)
    with spawned(stderr=subprocess.DEVNULL) as core:
        core.socket.sendall(encode_config(config))
        core.until(lambda: bool(core.of(LoadFailed)))
        (failed,) = core.of(LoadFailed)
        assert isinstance(failed, LoadFailed)
        assert len(failed.message) > 20
        assert core.process.wait(60) == EXIT_LOAD_FAILED == 78


PARENT = """
import os, socket, subprocess, sys, time
from aiexport_edge.proto.lifetime import PARENT_PID
ours, theirs = socket.socketpair()
os.set_inheritable(ours.fileno(), sys.argv[1] == "socket left open")
shared = os.memfd_create("suspects")
os.ftruncate(shared, 65536)
fds = [theirs.fileno(), shared] + ([ours.fileno()] if sys.argv[1] == "socket left open" else [])
core = subprocess.Popen(
    [sys.executable, "-m", "aiexport_edge.engine.core.process", "--fd", str(fds[0]), "--shared-fd", str(shared)],
    pass_fds=fds,
    env={**os.environ, PARENT_PID: str(os.getpid())},
)
print(core.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("how", ["socket closed", "socket left open"])
def test_it_dies_with_a_parent_that_is_killed(how: str) -> None:
    """By the kernel's word alone, too: a socket that something else holds open does not keep a core alive."""
    with subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        core = psutil.Process(int(parent.stdout.readline()))
        name = core.name()
        assert "python" in name or name == "aiexport-core"
        parent.kill()
        parent.wait()
        # It is nobody's child any more here: its end shows as its disappearance, or as a zombie that init reaps.
        gone, alive = psutil.wait_procs([core], timeout=60)
        assert gone or all(process.status() == psutil.STATUS_ZOMBIE for process in alive)
