"""The supervisor over small real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.edge import wait_until

from aiexport_edge.shim.cli import supervisor
from aiexport_edge.shim.cli.supervisor import Child, ChildSpec, StartFailed

# Appends its pid to the file named first, then does what follows.
ALIVE = "import os, sys, time, signal; f = open(sys.argv[1], 'a'); print(os.getpid(), file=f, flush=True); "
SLEEP = "time.sleep(100)"


def spec(code: str, *args: str | Path, fds: tuple[int, ...] = ()) -> ChildSpec:
    return ChildSpec("part", (sys.executable, "-c", code, *map(str, args)), fds)


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []


async def until(file: Path, count: int) -> list[int]:
    """Waits until `count` children have written their pids."""
    while len(pids(file)) < count:  # noqa: ASYNC110 - they are other processes
        await asyncio.sleep(0.01)
    return pids(file)


def alive(pid: int) -> bool:
    """A zombie is not: it is dead, only not yet reaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def test_a_child_that_is_killed_is_replaced(tmp_path: Path) -> None:
    async def work() -> None:
        log: list[str] = []
        child = Child(spec(ALIVE + SLEEP, tmp_path / "pids"), log.append)
        for count in (1, 2, 3):
            found = await until(tmp_path / "pids", count)
            assert alive(found[-1])
            if count < 3:
                os.kill(found[-1], signal.SIGKILL)
        await child.stop(20)
        assert not alive(found[-1])
        assert log == ["the part was killed (SIGKILL); starting it again"] * 2

    run(work())


def test_a_child_that_gives_up_before_all_was_ready_is_not_tried_again(tmp_path: Path) -> None:
    async def work() -> None:
        child = Child(spec(ALIVE + "sys.exit(1)", tmp_path / "pids"), lambda line: None)
        with pytest.raises(StartFailed, match="the part could not start; its last message above says why"):
            await child.ended
        assert len(pids(tmp_path / "pids")) == 1
        await child.stop(1)

    run(work())


def test_a_child_that_gives_up_later_is(tmp_path: Path) -> None:
    async def work() -> None:
        child = Child(spec(ALIVE + "sys.exit(1)", tmp_path / "pids"), lambda line: None)
        child.proven = True
        await until(tmp_path / "pids", 3)
        await child.stop(20)

    run(work())


def test_delays_grow_and_stop_need_not_wait_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child between two lives is stopped at once."""
    monkeypatch.setattr(supervisor, "FIRST_DELAY", 1000.0)

    async def work() -> None:
        again = asyncio.Event()
        child = Child(spec(ALIVE + "os.kill(os.getpid(), 9)", tmp_path / "pids"), lambda line: again.set())
        await again.wait()
        await child.stop(20)
        assert len(pids(tmp_path / "pids")) == 1

    run(work())


def test_a_child_that_does_not_end_is_killed(tmp_path: Path) -> None:
    async def work() -> None:
        log: list[str] = []
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " + ALIVE.partition("; ")[2]
        child = Child(spec("import os, sys, time, signal; " + deaf + SLEEP, tmp_path / "pids"), log.append)
        [pid] = await until(tmp_path / "pids", 1)
        await child.stop(0.2)
        assert not alive(pid)
        assert log == ["the part has not ended within 0 s; killing it"]

    run(work())


def test_connections_wait_while_a_worker_is_replaced(tmp_path: Path) -> None:
    """The listening socket is the supervisor's: between two workers a connection is queued, not refused."""
    serve_one = (
        "import socket; s = socket.socket(fileno=int(sys.argv[2])); "
        "c, _ = s.accept(); c.sendall(b'%d' % os.getpid()); c.close(); os.kill(os.getpid(), 9)"
    )

    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            fd = listener.fileno()
            child = Child(spec(ALIVE + serve_one, tmp_path / "pids", str(fd), fds=(fd,)), lambda line: None)
            served = []
            for _ in range(4):
                reader, writer = await asyncio.open_connection(*address)
                served.append(int(await reader.read()))
                writer.close()
            assert served == pids(tmp_path / "pids")[:4]
            await child.stop(20)

    run(work())


SUPERVISOR = """
import asyncio, sys
from aiexport_edge.shim.cli.supervisor import Child, ChildSpec

async def main():
    code = (
        "import os, sys, time; from aiexport_edge.proto.lifetime import die_with_parent; die_with_parent(); "
        "f = open(sys.argv[1], 'a'); print(os.getpid(), file=f, flush=True); time.sleep(100)"
    )
    Child(ChildSpec("part", (sys.executable, "-c", code, sys.argv[1])), print)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path / "pids")]) as process:
        try:
            wait_until(lambda: bool(pids(tmp_path / "pids")), "the child has started")
            [child] = pids(tmp_path / "pids")
            assert alive(child)
        finally:
            process.kill()
    wait_until(lambda: not alive(child), "the child has died with it", 60)


def test_a_child_does_not_inherit_what_is_hidden_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "s3cret")
    monkeypatch.setenv("NO_SECRET", "shown")
    code = (
        "import os, sys, time; f = open(sys.argv[1] + '.new', 'w'); print(sorted(os.environ.items()), file=f); "
        "f.close(); os.rename(f.name, sys.argv[1]); "
    )

    async def work() -> None:
        made = spec(code + SLEEP, tmp_path / "environment")
        child = Child(ChildSpec(made.name, made.argv, hidden=("A_SECRET",)), print)
        while not (tmp_path / "environment").exists():  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.01)
        await child.stop(10)

    run(work())
    found = (tmp_path / "environment").read_text()
    assert "shown" in found
    assert "s3cret" not in found


@pytest.mark.parametrize("stderr", ["full disk", "reader has left", "reader stands still"])
def test_a_log_that_takes_no_lines_ends_nothing(stderr: str) -> None:
    if stderr == "full disk":
        descriptors = [os.open("/dev/full", os.O_WRONLY)]
    else:
        descriptors = list(reversed(os.pipe()))
        os.set_blocking(descriptors[0], False)
        with suppress(BlockingIOError):
            while True:
                os.write(descriptors[0], bytes(4096))
        os.set_blocking(descriptors[0], True)
        if stderr == "reader has left":
            os.close(descriptors.pop())
    code = "from aiexport_edge.shim.cli.supervisor import log; log('a line'); print('on it goes')"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=descriptors[0], timeout=60, check=True
    )
    for descriptor in descriptors:
        os.close(descriptor)
    assert done.stdout == b"on it goes\n"
