"""The sliding minute, wherever it is counted: exact, also with many processes at once, and after a refund."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.postgres import PostgresServer
from support.redis import RedisServer

from aiexport_edge.shim.limits import shared_window
from aiexport_edge.shim.limits.limits import Limits, Ticket
from aiexport_edge.shim.limits.postgres_window import PostgresWindow
from aiexport_edge.shim.limits.redis_window import RedisWindow
from aiexport_edge.shim.limits.shared_window import SharedWindow, shared_directory
from aiexport_edge.shim.limits.window import Taken, Window
from aiexport_edge.shim.store import open_store

Windows = Callable[[], Window]
SECOND = 1_000_000_000


@pytest.fixture(params=["shared", "postgresql", "redis"])
def make_window(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Windows]:
    """Each call is another process's window on the same minute."""
    if request.param == "shared":
        yield lambda: SharedWindow(tmp_path)
    elif request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis")
        count = iter(range(100))

        def on_redis() -> Window:
            machine = tmp_path / f"machine-{next(count)}"
            machine.mkdir()
            return RedisWindow(server.url, None, SharedWindow(machine), timeout_s=60)

        yield on_redis
    else:
        postgres: PostgresServer = request.getfixturevalue("postgres")
        store = open_store(postgres.url(postgres.new_database()))
        with ThreadPoolExecutor(8) as threads:
            yield lambda: PostgresWindow(store.database, threads)
        store.close()


def test_exactly_the_limit_passes(make_window: Windows) -> None:
    async def run() -> None:
        windows = [make_window() for _ in range(3)]
        found = await asyncio.gather(*(windows[i % 3].take("ws_a", 5) for i in range(20)))
        let_in = [taken for taken in found if taken.mark is not None]
        assert sorted(taken.remaining for taken in let_in) == [0, 1, 2, 3, 4]
        for taken in found:
            if taken.mark is None:
                assert taken.remaining == 0
                assert 0 < taken.retry_after_s <= taken.reset_s <= 60
        assert (await windows[0].take("ws_b", 5)).remaining == 4  # another workspace has its own
        # One is given back: one more passes, whoever asks.
        assert let_in[0].mark is not None
        await windows[1].give_back("ws_a", let_in[0].mark)
        again = [await window.take("ws_a", 5) for window in windows]
        assert [taken.mark is not None for taken in again] == [True, False, False]
        # A larger limit holds at once, a smaller one too.
        assert [(await windows[2].take("ws_a", 200)).remaining for _ in range(3)] == [194, 193, 192]
        assert (await windows[0].take("ws_a", 5)).mark is None
        for window in windows:
            await window.close()

    asyncio.run(run())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "take", "give back"]), st.integers(0, 20), st.integers(1, 8))))
def test_the_shared_ring_is_the_plain_rule(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]
) -> None:
    """Against a list of times, over any order of calls, refunds, pauses and changes of the limit; two processes."""
    directory = tmp_path_factory.mktemp("ring")
    windows = [SharedWindow(directory), SharedWindow(directory)]
    now = 1000 * SECOND
    times: list[int] = []
    try:
        for number, (what, seconds, limit) in enumerate(steps):
            now += seconds * SECOND
            ring = windows[number % 2]._ring("ws_a", limit)
            if what == "take":
                recent = [at for at in times if at > now - 60 * SECOND]
                taken = ring.take(now, limit)
                if len(recent) < limit:
                    times.append(now)
                    assert taken == Taken(now, limit - len(recent) - 1, 60.0)
                else:
                    wait = recent[len(recent) - limit] + 60 * SECOND - now
                    assert taken == Taken(None, 0, (recent[-1] + 60 * SECOND - now) / SECOND, wait / SECOND)
            elif times:
                ring.remove(times.pop(number % len(times)))
            assert ring.times()[-len(times) :] == times[-64:] if times else True
    finally:
        for window in windows:
            asyncio.run(window.close())


_TAKER = """
import asyncio, json, sys
from pathlib import Path
from aiexport_edge.shim.limits.shared_window import SharedWindow

async def run():
    window = SharedWindow(Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    taken = [await window.take("ws_a", 500) for _ in range(400)]
    print(json.dumps(sum(each.mark is not None for each in taken)))

asyncio.run(run())
"""


def test_real_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _TAKER, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sum(json.loads(process.communicate(timeout=60)[0]) for process in processes) == 500


def test_a_lock_whose_holder_was_killed_is_free(tmp_path: Path) -> None:
    script = f"""
import fcntl, os, signal
fd = os.open({str(tmp_path / "lock")!r}, os.O_RDWR | os.O_CREAT)
fcntl.flock(fd, fcntl.LOCK_EX)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)

    async def run() -> Taken:
        window = SharedWindow(tmp_path)
        try:
            return await window.take("ws_a", 5)
        finally:
            await window.close()

    assert asyncio.run(run()).remaining == 4


def test_a_busy_lock_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    async def run() -> None:
        first, second = SharedWindow(tmp_path), SharedWindow(tmp_path)
        await first._acquire()
        waiting = asyncio.create_task(second.take("ws_a", 5))
        for _ in range(shared_window._EAGER_ATTEMPTS + 10):
            await asyncio.sleep(0)
        assert not waiting.done()
        fcntl.flock(first._lock, fcntl.LOCK_UN)
        assert (await waiting).remaining == 4
        await first.close()
        await second.close()

    asyncio.run(run())


def test_a_ring_left_halfway_through_growing_is_grown_again(tmp_path: Path) -> None:
    async def run() -> None:
        window = SharedWindow(tmp_path)
        for _ in range(3):
            await window.take("ws_a", 5)
        window._rings["ws_a"]._numbers[0] = shared_window._MOVED  # and the new file never came
        assert (await window.take("ws_a", 5)).remaining == 1
        (tmp_path / "ws_b").write_bytes(bytes(8 * 67))  # made, never finished
        assert (await window.take("ws_b", 5)).remaining == 4
        await window.close()

    asyncio.run(run())


def test_files_in_which_nothing_counts_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a start, and where there is no more room; whoever has one mapped looks for the new one."""

    def names() -> list[str]:
        return sorted(file.name for file in tmp_path.iterdir())

    async def run() -> None:
        first = SharedWindow(tmp_path)
        for workspace in ("ws_idle", "ws_busy"):
            await first.take(workspace, 5)
        idle = first._rings["ws_idle"]
        idle._numbers[3] -= 61 * SECOND
        (tmp_path / "ws_x.new").touch()
        second = SharedWindow(tmp_path)
        assert names() == ["lock", "ws_busy"]
        assert (await second.take("ws_idle", 5)).remaining == 4
        assert (await first.take("ws_idle", 5)).remaining == 3
        assert (await second.take("ws_busy", 5)).remaining == 3

        full = iter([OSError(28, "No space left on device")])
        real = shared_window._Ring._make

        def make(*arguments: object) -> object:
            for error in full:
                raise error
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(shared_window._Ring, "_make", make)
        assert (await second.take("ws_new", 5)).remaining == 4
        monkeypatch.setattr(shared_window, "_MAX_MAPPED", 1)
        assert (await second.take("ws_other", 5)).remaining == 4
        assert (await second.take("ws_new", 5)).remaining == 3
        for window in (first, second):
            await window.close()

    asyncio.run(run())


def test_files_that_somebody_removes(tmp_path: Path) -> None:
    """Who ran before and who starts after meet again in new ones."""

    async def run() -> None:
        directory = tmp_path / "shared"
        first = SharedWindow(directory)
        assert (await first.take("ws_a", 5)).remaining == 4
        shutil.rmtree(directory)
        second = SharedWindow(directory)
        assert (await second.take("ws_a", 5)).remaining == 4
        assert (await first.take("ws_a", 5)).remaining == 3
        shutil.rmtree(directory)
        assert (await first.take("ws_a", 5)).remaining == 4
        assert (await second.take("ws_a", 5)).remaining == 3
        for window in (first, second):
            await window.close()

    asyncio.run(run())


def test_the_shared_directory_is_private_and_the_state_directorys(tmp_path: Path) -> None:
    one, other = shared_directory(tmp_path / "one"), shared_directory(tmp_path / "other")
    try:
        assert one != other
        (tmp_path / "link").symlink_to(tmp_path / "one")
        assert shared_directory(tmp_path / "link") == one
        assert one.stat().st_mode & 0o077 == 0
        one.chmod(0o755)
        with pytest.raises(PermissionError, match="belongs to somebody else"):
            shared_directory(tmp_path / "one")
    finally:
        shutil.rmtree(one)
        shutil.rmtree(other)


def test_redis_goes_away_and_comes_back(
    redis: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each machine then counts by itself, beginning with what its own processes have let in."""
    monkeypatch.setattr("aiexport_edge.shim.limits.redis_window.RETRY_S", 0.0)

    async def run() -> None:
        machines = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            machines.append(RedisWindow(redis.url, None, SharedWindow(tmp_path / name), timeout_s=60))
        one, two = machines
        for _ in range(4):
            assert (await one.take("ws_a", 5)).mark is not None
        assert (await two.take("ws_a", 5)).remaining == 0
        assert (await two.take("ws_a", 5)).mark is None
        redis.stop()
        assert (await one.take("ws_a", 5)).remaining == 0
        assert (await one.take("ws_a", 5)).mark is None
        local = await two.take("ws_a", 5)
        assert local.remaining == 3
        assert local.mark is not None
        await two.give_back("ws_a", local.mark)
        assert (await two.take("ws_a", 5)).remaining == 3
        redis.start()
        assert (await two.take("ws_a", 5)).remaining == 4  # this Redis has forgotten
        for machine in machines:
            await machine.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    messages = [record.getMessage() for record in caplog.records if "Redis" in record.getMessage()]
    assert sum("does not answer" in message for message in messages) == 2  # once a machine
    assert sum("answers again" in message for message in messages) == 1
    assert not any(str(tmp_path) in message for message in messages)


def test_a_redis_that_hangs_is_one_that_is_away(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()

        async def run() -> None:
            window = RedisWindow(f"unix://{tmp_path}/silent.sock", None, SharedWindow(tmp_path), timeout_s=0.05)
            assert (await window.take("ws_a", 5)).remaining == 4
            await window.close()

        asyncio.run(run())


@pytest.mark.prove
def test_a_call_takes_microseconds(tmp_path: Path) -> None:
    async def run() -> float:
        window = SharedWindow(tmp_path)
        began = time.process_time()
        for _ in range(20_000):
            await window.take("ws_a", 600)
        spent = time.process_time() - began
        await window.close()
        return spent / 20_000

    assert asyncio.run(run()) < 1e-3


def test_memory_that_is_gone_breaks_no_refusal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reply is under way when a refused call is given back: an error there would have taken it."""
    directory = tmp_path / "memory"

    async def refused() -> None:
        window = SharedWindow(directory)
        ticket = Ticket(cast(Limits, None), window, "ws_1", 5, None)  # without a limit of tokens it asks nothing more
        await ticket.take()
        shutil.rmtree(directory)
        directory.write_text("something else")
        await ticket.give_back()
        await window.close()

    asyncio.run(refused())
    assert "stays counted" in caplog.text
