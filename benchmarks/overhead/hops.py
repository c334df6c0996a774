"""Where a first token's time goes: `python -m benchmarks.overhead.hops [--samples 300] [--prompt-ms 20]`.

The stack of `processes.py`, its calls at the seams between its parts wrapped so that each notes the time in memory that
this process reads too: a third of a microsecond a note. One request after the other, with a pause between, on one
connection. Prints the median of the time from each seam to the next; what lies between two seams of different
processes is the system's and gRPC's, idle processors' waking included.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import mmap
import os
import statistics
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.overhead import client
from benchmarks.overhead.processes import stack

MODULE = "benchmarks.overhead.hops"
FOLDER = "OVERHEAD_HOPS"  # of the environment: where the notes lie
MAX_NOTES = 1 << 18
PAUSE_S = 0.02
# Of a request, in the order in which it comes by them: the first of its kind after the one before.
HOPS = (
    "client sends",
    "shim reads",
    "endpoint",
    "caller known",
    "body read and checked",
    "submitted",
    "gRPC write begins",
    "engine has it",
    "core is written to",
    "core has it",
    "core answers",
    "engine reads that",
    "message made",
    "shim has it",
    "shim writes",
    "client has it",
)


class Notes:
    """Times by kind, in a file that is mapped by who writes and who reads."""

    def __init__(self, file: Path) -> None:
        size = 8 * (1 + 2 * MAX_NOTES)
        if not file.exists():
            file.write_bytes(bytes(size))
        with file.open("r+b") as opened:
            self._numbers = memoryview(mmap.mmap(opened.fileno(), size)).cast("q")

    def add(self, kind: int) -> None:
        self.add_at(kind, time.monotonic_ns())

    def add_at(self, kind: int, moment: int) -> None:
        numbers = self._numbers
        at = numbers[0]
        if at < MAX_NOTES:
            numbers[1 + 2 * at], numbers[2 + 2 * at] = kind, moment
            numbers[0] = at + 1

    def read(self) -> dict[int, list[int]]:
        """Of each kind the times, in their order."""
        found: dict[int, list[int]] = {}
        for at in range(self._numbers[0]):
            found.setdefault(self._numbers[1 + 2 * at], []).append(self._numbers[2 + 2 * at])
        return found


# ---------------------------------------------------------------------------------------------- in the processes


def _begin(notes: Notes, owner: Any, name: str, hop: str, when: Callable[..., bool] = lambda *_: True) -> None:
    """Notes the beginning of each call."""
    wrapped, kind = getattr(owner, name), HOPS.index(hop)

    @functools.wraps(wrapped)
    def noting(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            notes.add(kind)
        return wrapped(*arguments, **named)

    setattr(owner, name, noting)


def _end(notes: Notes, owner: Any, name: str, hop: str) -> None:
    wrapped, kind = getattr(owner, name), HOPS.index(hop)

    @functools.wraps(wrapped)
    def noting(*arguments: Any, **named: Any) -> Any:
        result = wrapped(*arguments, **named)
        notes.add(kind)
        return result

    setattr(owner, name, noting)


def _end_async(notes: Notes, owner: Any, name: str, hop: str) -> None:
    wrapped, kind = getattr(owner, name), HOPS.index(hop)

    @functools.wraps(wrapped)
    async def noting(*arguments: Any, **named: Any) -> Any:
        result = await wrapped(*arguments, **named)
        notes.add(kind)
        return result

    setattr(owner, name, noting)


def _note_shim(notes: Notes, server: Any) -> None:
    """Once it serves: what is imported before has to find its own settings in the environment."""
    serve = server.serve

    async def noting(*arguments: Any) -> Any:
        import grpc.aio._call

        from aiexport_edge.shim import http_protocol, response_stream
        from aiexport_edge.shim.api import messages
        from aiexport_edge.shim.engines import session

        _begin(notes, http_protocol.HttpProtocol, "data_received", "shim reads")
        _begin(notes, messages.Messages, "__call__", "endpoint")
        _end_async(notes, messages, "enter", "caller known")
        _end_async(notes, messages.Messages, "_read", "body read and checked")
        _end(notes, session.Session, "submit", "submitted")
        _begin(notes, grpc.aio._call.StreamStreamCall, "write", "gRPC write begins")
        _begin(notes, session.Session, "_dispatch", "shim has it", lambda _, outputs: bool(outputs.deltas.tags))
        _begin(notes, response_stream.TurnWriter, "_flush", "shim writes")
        return await serve(*arguments)

    server.serve = noting


def _note_engine(notes: Notes, _engine: Any) -> None:
    from aiexport_edge.engine.backends import core_process, native
    from aiexport_edge.engine.server import outbox, session

    _begin(notes, session.Session, "_handle", "engine has it")
    _begin(notes, core_process.CoreProcess, "write", "core is written to")
    _begin(notes, native.NativeBackend, "_on_frame", "engine reads that")
    _end_async(notes, outbox.Outbox, "take", "message made")
    made = native.NativeBackend.__init__

    def with_noted_core(self: Any, config: Any, *, command: list[str]) -> None:
        interpreter, _, *arguments = command
        made(self, config, command=[interpreter, "-m", MODULE, "--run", "benchmarks.overhead.core", *arguments])

    native.NativeBackend.__init__ = with_noted_core  # type: ignore[method-assign,assignment]


def _note_core(notes: Notes, core: Any) -> None:
    _begin(notes, core.FakeCore, "_add", "core has it")
    _begin(notes, core, "encode_from_core", "core answers", lambda report: bool(getattr(report, "tokens", ())))


_NOTERS = {
    "aiexport_edge.shim.server": _note_shim,
    "benchmarks.overhead.engine": _note_engine,
    "benchmarks.overhead.core": _note_core,
}


def run_noted(module: str, arguments: list[str]) -> Any:
    """`python -m MODULE ARGUMENTS`, noted."""
    sys.argv = [module, *arguments]
    found = importlib.import_module(module)
    _NOTERS[module](Notes(Path(os.environ[FOLDER]) / module), found)
    return found.main()


# ---------------------------------------------------------------------------------------------- in this process


def measure(samples: int, prompt_ms: int) -> list[tuple[str, str, float, float]]:
    """From, to, median and 90th percentile in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        mine = Notes(Path(folder) / "client")
        with stack(through=MODULE) as running:
            sent = client.request(running.key, max_tokens=2, prompt_ms=prompt_ms, pace_us=5000)
            with client.connect(running.address) as connection:
                for _ in range(samples + 10):
                    began = time.monotonic_ns()
                    first_s = client.first_token_s(connection, sent)
                    mine.add_at(HOPS.index("client sends"), began)
                    mine.add_at(HOPS.index("client has it"), began + round(first_s * 1e9))
                    time.sleep(PAUSE_S)
        times: dict[int, list[int]] = {}
        for file in Path(folder).iterdir():
            times |= Notes(file).read()
    return _between(times, samples)


def _between(times: dict[int, list[int]], samples: int) -> list[tuple[str, str, float, float]]:
    gaps: list[list[float]] = [[] for _ in HOPS]
    for started in times[0][-samples:]:
        now = started
        for kind in range(1, len(HOPS)):
            at = bisect_left(times[kind], now)
            gaps[kind].append((times[kind][at] - now) / 1e6)
            now = times[kind][at]
    return [
        (HOPS[kind - 1], HOPS[kind], statistics.median(found), sorted(found)[len(found) * 9 // 10])
        for kind, found in enumerate(gaps)
        if found
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead.hops", description=__doc__)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--prompt-ms", type=int, default=20, help="how long the core takes for a prompt")
    options = parser.parse_args()
    rows = measure(options.samples, options.prompt_ms)
    for one, other, median, late in rows:
        print(f"{one:>22} → {other:<22} {median:8.3f} ms, p90 {late:.3f}")
    print(f"{'':>22}   {'all of them':<22} {sum(row[2] for row in rows):8.3f} ms")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        sys.exit(run_noted(sys.argv[2], sys.argv[3:]))
    sys.exit(main())
