"""The worker process: `python -m aiexport_edge.engine.backends.vllm.process --fd N --shared-fd M`.

Started as a core is (`engine/core/process.py`), by the interpreter of the environment that vLLM is installed in: fd N
is a stream socket to the parent, whose first frame is a `WorkerConfig`; fd M the memory of `suspects.py`. Exit status:
0 when told to or when the parent is gone, 70 for a bug or an engine that broke down, 78 when the model cannot be served
(after a `LoadFailed`). Where vLLM's engine was killed it ends in the same way, so that the parent tells the two apart.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, Protocol

from aiexport_edge.engine.backends.core_process import Frames
from aiexport_edge.engine.backends.vllm.descendants import bind_descendants
from aiexport_edge.engine.backends.vllm.gate import Gate
from aiexport_edge.engine.backends.vllm.protocol import WorkerConfig, decode_worker_config
from aiexport_edge.engine.backends.vllm.worker import AsyncEngine, EngineDead, Worker
from aiexport_edge.engine.core.channel import Channel, ChannelClosed
from aiexport_edge.engine.core.protocol import (
    AdapterRoom,
    LoadFailed,
    ModelReady,
    Ready,
    Shutdown,
    StepReport,
    decode_to_core,
    encode_from_core,
)
from aiexport_edge.engine.core.suspects import Suspects
from aiexport_edge.proto.lifetime import die_with_parent

EXIT_BUG = os.EX_SOFTWARE  # 70
EXIT_LOAD_FAILED = os.EX_CONFIG  # 78


class LoadError(Exception):
    """The model cannot be served; a sentence for the operator."""


class LoadedEngine(AsyncEngine, Protocol):
    """An engine with what the parent is told of it once."""

    tokens_per_page: int
    capacity_tokens: int


Load = Callable[[WorkerConfig, Callable[[], None]], LoadedEngine]


def load_vllm(config: WorkerConfig, heard: Callable[[], None]) -> LoadedEngine:
    """vLLM's engine with its model. Raises `LoadError`."""
    try:
        import vllm
    except ImportError as error:
        raise LoadError(
            f"vLLM is not installed where {sys.executable} looks ({error}); install it there, or name the interpreter "
            "of its environment as python in [models.vllm]"
        ) from error
    from aiexport_edge.engine.backends.vllm.engine import SUPPORTED, VllmEngine

    if not vllm.__version__.startswith(f"{SUPPORTED}."):
        raise LoadError(f"vLLM {vllm.__version__} is installed, but {SUPPORTED} is what this engine works with")
    try:
        return VllmEngine(config, heard)
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LoadError(f"vLLM cannot serve model {config.model.name}: {first}") from error


def main(argv: list[str] | None = None, load: Load = load_vllm) -> int:
    """Serve one parent; the exit status."""
    die_with_parent()
    # A terminal's Ctrl-C and a service manager's stop reach the whole group: the parent decides about its worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.dup2(2, 1)  # what vLLM prints is for the log
    bind_descendants()
    parser = argparse.ArgumentParser(prog="aiexport_edge.engine.backends.vllm.process")
    parser.add_argument("--fd", type=int, required=True, help="stream socket to the parent")
    parser.add_argument("--shared-fd", type=int, required=True, help="memory file for the handles in vLLM's hands")
    arguments = parser.parse_args(argv)
    sock = socket.socket(fileno=arguments.fd)
    channel = Channel(sock)
    try:
        (body,) = channel.receive(wait=True, at_most=1)
        config = decode_worker_config(body)
        process = _Process(config, Suspects(arguments.shared_fd))
        try:
            engine = load(config, process.heard)
        except LoadError as error:
            channel.send(encode_from_core(LoadFailed(str(error))))
            channel.flush()
            return EXIT_LOAD_FAILED
        asyncio.run(process.serve(engine, sock))
    except ChannelClosed:
        return 0
    except BaseException:
        traceback.print_exc()
        return EXIT_BUG


class _Process:
    """The worker between its socket and its engine, for one life."""

    def __init__(self, config: WorkerConfig, suspects: Suspects) -> None:
        self._config = config
        self._suspects = suspects
        self._worker: Worker | None = None
        self._transport: asyncio.WriteTransport | None = None

    def heard(self) -> None:
        """The engine has told of a step."""
        if self._worker is not None:
            self._worker.heard()

    async def serve(self, engine: LoadedEngine, sock: socket.socket) -> NoReturn:
        """Says that all is ready, then runs until the process ends."""
        config, loop = self._config, asyncio.get_running_loop()
        gate = Gate(
            max_num_running=config.max_num_running * config.data_parallel,
            batch_floor_share=config.batch_floor_share,
        )
        worker = self._worker = Worker(engine, gate, self._suspects, send=self._send, die=self._die)
        self._transport, _ = await loop.create_connection(
            lambda: Frames(self._on_frame, lambda: self._finish(0)), sock=sock
        )
        ready = ModelReady(0, engine.tokens_per_page, 0, engine.capacity_tokens)
        room = AdapterRoom(config.adapter_slots, config.max_adapter_rank)
        self._transport.write(encode_from_core(Ready([ready], worker.stats(), room)))
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    def _on_frame(self, body: bytes) -> None:
        messages = decode_to_core(body)
        if any(isinstance(message, Shutdown) for message in messages):
            self._finish(0)
            return
        assert self._worker is not None
        try:
            self._worker.take(messages)
        except Exception as error:
            self._die(error)

    def _send(self, report: StepReport) -> None:
        assert self._transport is not None
        self._transport.write(encode_from_core(report))

    def _die(self, error: BaseException) -> None:
        if isinstance(error, EngineDead):
            if error.by_kill:
                os.kill(os.getpid(), signal.SIGKILL)
            print("vLLM's engine has broken down; its last words are above.", file=sys.stderr)
        else:
            traceback.print_exception(error)
        self._finish(EXIT_BUG)

    def _finish(self, status: int) -> None:
        # Not by way of asyncio: nothing that still runs has a say in it.
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    os._exit(main())
