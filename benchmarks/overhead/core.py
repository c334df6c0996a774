"""A core process without a model: it speaks the core's protocol on its socket and emits tokens at will.

Every running request gets one token a step. A request's `seed` says how long a step takes, in microseconds; with
several the shortest counts, 0 is as fast as the parent reads. Its `top_k` says how many milliseconds its prompt takes
before the first token. What it emits goes round a list of ids. Aborts are told, with the time of CLOCK_MONOTONIC at
which they were read, as datagrams to the socket of `--reports`.

    python core.py --ids FILE --reports SOCKET --fd N --shared-fd M
"""

from __future__ import annotations

import argparse
import contextlib
import select
import socket
import sys
import time
from pathlib import Path

from aiexport_edge.engine.core.protocol import (
    HEADER,
    AbortRequest,
    AddRequest,
    CoreConfig,
    CoreStats,
    Finished,
    FinishReason,
    FinishRequest,
    ModelReady,
    Ready,
    Shutdown,
    Started,
    StepReport,
    Tokens,
    decode_config,
    decode_to_core,
    encode_from_core,
    unpack_ids,
)
from aiexport_edge.proto.lifetime import die_with_parent

AWAKE_S = 0.0003  # before a prompt's end: a core that computes does not sleep when it is done


class FakeCore:
    """One parent, any number of requests."""

    def __init__(self, parent: socket.socket, ids: list[int], reports: socket.socket) -> None:
        self._parent = parent
        self._ids = ids
        self._reports = reports
        self._left: dict[int, int] = {}  # tokens that each running request has yet to get
        self._pace_s: dict[int, float] = {}
        self._new: list[int] = []
        self._prompts: list[tuple[float, AddRequest]] = []  # when each is computed; soonest first
        self._received = bytearray()
        self._num_steps = 0

    def run(self) -> None:
        """Until the parent is gone."""
        (body,) = self._read(wait=True)
        self._parent.sendall(encode_from_core(_ready(decode_config(body))))
        due = 0.0
        while True:
            now = time.monotonic()
            while self._prompts and self._prompts[0][0] - AWAKE_S <= now:
                ends_at, request = self._prompts.pop(0)
                while now < ends_at:
                    now = time.monotonic()
                self._start(request)
                due = now
            times = [due] if self._left else []
            if self._prompts:
                times.append(self._prompts[0][0] - AWAKE_S)
            wait_s = min(times) - now if times else None
            if wait_s is None or wait_s > 0 or self._is_readable():
                if not select.select([self._parent], [], [], None if wait_s is None else max(0.0, wait_s))[0]:
                    continue
                for body in self._read(wait=False):
                    for message in decode_to_core(body):
                        match message:
                            case AddRequest():
                                self._add(message)
                            case AbortRequest(handle):
                                self._end(handle)
                                with contextlib.suppress(BlockingIOError):  # nobody listens just now
                                    self._reports.send(str(time.monotonic_ns()).encode())
                            case FinishRequest(handle):
                                self._end(handle)
                            case Shutdown():
                                return
                continue
            if not self._left or due > time.monotonic():
                continue
            self._step()
            pace_s = min(self._pace_s.values(), default=0.0)
            due = max(due + pace_s, time.monotonic() - pace_s)

    def _is_readable(self) -> bool:
        return bool(select.select([self._parent], [], [], 0)[0])

    def _read(self, *, wait: bool) -> list[bytes]:
        frames: list[bytes] = []
        while True:
            data = self._parent.recv(1 << 18)
            if not data:
                raise SystemExit(0)
            self._received += data
            while len(self._received) >= HEADER.size:
                (size,) = HEADER.unpack_from(self._received)
                if len(self._received) < HEADER.size + size:
                    break
                frames.append(bytes(self._received[HEADER.size : HEADER.size + size]))
                del self._received[: HEADER.size + size]
            if frames or not wait:
                return frames

    def _add(self, request: AddRequest) -> None:
        self._prompts.append((time.monotonic() + request.sampling.top_k / 1e3, request))
        self._prompts.sort(key=lambda prompt: prompt[0])

    def _start(self, request: AddRequest) -> None:
        self._left[request.handle] = request.max_tokens - len(unpack_ids(request.output_ids))
        self._pace_s[request.handle] = request.sampling.seed / 1e6
        self._new.append(request.handle)

    def _end(self, handle: int) -> None:
        self._prompts = [prompt for prompt in self._prompts if prompt[1].handle != handle]
        self._left.pop(handle, None)
        self._pace_s.pop(handle, None)

    def _step(self) -> None:
        ids = [self._ids[self._num_steps % len(self._ids)]]
        self._num_steps += 1
        tokens, finished = [], []
        for handle, left in self._left.items():
            tokens.append(Tokens(handle, ids))
            self._left[handle] = left - 1
            if left == 1:
                finished.append(Finished(handle, FinishReason.MAX_TOKENS))
        started = [Started(handle, 0) for handle in self._new if handle in self._left]
        self._new.clear()
        for end in finished:
            self._end(end.handle)
        self._parent.sendall(encode_from_core(StepReport(started, tokens, finished)))


def _ready(config: CoreConfig) -> Ready:
    window = max(model.context_window for model in config.models)
    ready = [ModelReady(index, 16, 0, window) for index in range(len(config.models))]
    zeros = [0] * len(config.models)
    return Ready(ready, CoreStats(0, 0, 0, 1, 0, 0, 1, 4096, 0, zeros, zeros, zeros, zeros, zeros))


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=Path, required=True, help="a file of token ids, one a line")
    parser.add_argument("--reports", required=True, help="a datagram socket that is told of aborts")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--shared-fd", type=int, required=True)
    arguments = parser.parse_args()
    reports = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    reports.connect(arguments.reports)
    reports.setblocking(False)
    ids = [int(line) for line in arguments.ids.read_text().split()]
    parent = socket.socket(fileno=arguments.fd)
    try:
        FakeCore(parent, ids, reports).run()
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)


if __name__ == "__main__":
    main()
