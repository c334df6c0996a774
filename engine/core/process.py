"""The core process: `python -m aiexport_edge.engine.core.process --fd N --shared-fd M`.

Owns its start and its end: fd N is a stream socket to the parent, whose first frame is a `CoreConfig`; fd M is the
shared memory of `suspects.py`. It ends with its parent, whatever way that ends. Exit status: 0 when told to or when the
parent is gone, 70 for a bug (traceback on stderr), 78 when the models cannot be loaded (after a `LoadFailed`).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from aiexport_edge.engine.core.channel import Channel, ChannelClosed
from aiexport_edge.engine.core.loop import StepLoop
from aiexport_edge.engine.core.pages import PagePool
from aiexport_edge.engine.core.pictures import Pictures
from aiexport_edge.engine.core.plan import StepRunner
from aiexport_edge.engine.core.protocol import (
    CoreConfig,
    LoadFailed,
    Loading,
    ModelReady,
    Ready,
    Warming,
    decode_config,
    encode_from_core,
)
from aiexport_edge.engine.core.scheduler import Scheduler
from aiexport_edge.engine.core.suspects import Suspects
from aiexport_edge.proto.lifetime import die_with_parent

EXIT_BUG = os.EX_SOFTWARE  # 70
EXIT_LOAD_FAILED = os.EX_CONFIG  # 78

_PR_SET_NAME = 15  # prctl(2)


def main(argv: list[str] | None = None) -> int:
    """Serve one parent; the exit status."""
    die_with_parent()  # the kernel's word for it, also in the middle of a step; else the socket's end tells
    _prepare_process()
    gc.disable()  # until all is loaded: collections walk over what is imported, a quarter of a second in all
    # Before torch is imported: OpenMP threads that spin at barriers are 10× slower where event loops share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's library, which multiplies nothing here
    # The longest part of the start, begun while the parent still makes up its configuration.
    threading.Thread(target=_import_runner, daemon=True).start()
    parser = argparse.ArgumentParser(prog="aiexport_edge.engine.core.process")
    parser.add_argument("--fd", type=int, required=True, help="stream socket to the parent")
    parser.add_argument("--shared-fd", type=int, required=True, help="memory file for the handles in the running step")
    arguments = parser.parse_args(argv)
    try:
        channel = Channel(socket.socket(fileno=arguments.fd))
        (body,) = channel.receive(wait=True, at_most=1)
        config = decode_config(body)
        runner = _load(config, channel)
        if runner is None:
            return EXIT_LOAD_FAILED
        _serve(config, runner, channel, Suspects(arguments.shared_fd))
    except ChannelClosed:
        return 0
    except BaseException:
        traceback.print_exc()
        return EXIT_BUG
    return 0


def _prepare_process() -> None:
    # A terminal's Ctrl-C and a service manager's stop reach the whole group: the parent decides about its core.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A thread that compiles a grammar holds the interpreter: the loop gets it back in a tenth of the usual 5 ms.
    sys.setswitchinterval(0.0005)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_NAME, b"aiexport-core")


def _import_runner() -> None:
    with contextlib.suppress(Exception):  # `_load` comes upon the same, and tells
        from aiexport_edge.engine.core.torch_start import import_torch

        import_torch()
        import aiexport_edge.engine.core.loading  # noqa: F401


def _load(config: CoreConfig, channel: Channel) -> StepRunner[Any] | None:
    """The runner with every model loaded; None, and the parent told why, when that fails."""

    def progress(model: int, done: int, total: int) -> None:
        channel.send(encode_from_core(Loading(model, done, total)))

    def warming(done: int, total: int) -> None:
        channel.send(encode_from_core(Warming(done, total)))

    try:
        from aiexport_edge.engine.core.torch_start import import_torch

        import_torch()
        from aiexport_edge.engine.core.loading import load

        return load(config, progress, warming)
    except ChannelClosed:
        raise
    except Exception as error:
        traceback.print_exc()
        channel.send(encode_from_core(LoadFailed(str(error) or type(error).__name__)))
        channel.flush()
        return None


def _serve(config: CoreConfig, runner: StepRunner[Any], channel: Channel, suspects: Suspects) -> None:
    """Say that all is ready, then run until told to end."""
    from aiexport_edge.kernels.large_pages import collapse_meanwhile

    scheduler = Scheduler(
        PagePool(runner.num_pages),
        revisions=[model.revision for model in config.models],
        tokens_per_page=runner.tokens_per_page,
        max_num_running=config.max_num_running,
        max_step_tokens=runner.max_step_tokens,
        batch_floor_share=config.batch_floor_share,
        pictures=Pictures(runner.eyes, capacity_bytes=runner.picture_bytes),
        pace=runner.pace,
        draft_cost=runner.draft_cost,
        num_adapter_slots=runner.adapter_room.slots,
    )
    loop = StepLoop(channel=channel, scheduler=scheduler, runner=runner, suspects=suspects)
    models = [
        ModelReady(model, runner.tokens_per_page[model], runner.weight_bytes[model], scheduler.capacity_tokens(model))
        for model in range(len(config.models))
    ]
    channel.send(encode_from_core(Ready(models, loop.stats(), runner.adapter_room)))
    gc.freeze()  # what is loaded stays: no collection walks over it between steps
    gc.enable()
    collapse_meanwhile()
    loop.run()


if __name__ == "__main__":
    # Not sys.exit: the models' memory need not be given back piece by piece.
    os._exit(main())
