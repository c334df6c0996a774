"""A worker of the vLLM backend without vLLM: the real process, protocol, gate and commit around an engine by a rule.

    python scripted_vllm.py [--step-s S] [--announce-s S] [--fail-load FILE] [--poison ID] [--refuse ID]
                            [--break FILE] --fd N --shared-fd M

The id that follows a sequence is `scripted_core.next_id` of it. Pieces have one or two ids, and some go past an end, as
those of an engine that overlaps its steps do. A request with the poison id aborts the process, one with the id of
`--refuse` fails alone. Where the file of `--break` appears, the engine dies: of a kill, if the file says so.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.scripted_core import next_id

from aiexport_edge.engine.backends.vllm.process import LoadedEngine, LoadError, main
from aiexport_edge.engine.backends.vllm.protocol import WorkerConfig
from aiexport_edge.engine.backends.vllm.worker import EngineDead, EngineLoad, Piece, RequestFailed
from aiexport_edge.engine.core.protocol import AddRequest, AddVocabulary, CoreModel
from aiexport_edge.engine.core.request import Request

NUM_PAGES = 256
TOKENS_PER_PAGE = 16


def command(*options: object) -> tuple[str, ...]:
    """How a backend starts this worker."""
    return (sys.executable, str(Path(__file__).resolve()), *map(str, options))


def worker_config(*, max_num_running: int = 16) -> WorkerConfig:
    """A configuration for it; no directory is read."""
    return WorkerConfig(
        model=CoreModel(name="m0", path="", dtype="auto", context_window=4096, deterministic=False, revision="r0"),
        tensor_parallel=1,
        pipeline_parallel=1,
        data_parallel=1,
        distributed="auto",
        memory_share=0.9,
        kv_cache_bytes=0,
        quantization="",
        eager=None,
        attention="auto",
        max_num_running=max_num_running,
        max_step_tokens=0,
        batch_floor_share=0.05,
    )


class ScriptedEngine:
    """Draws by the rule; sleeps before each piece as a device would compute."""

    tokens_per_page = TOKENS_PER_PAGE
    capacity_tokens = NUM_PAGES * TOKENS_PER_PAGE

    def __init__(self, options: argparse.Namespace, heard: Callable[[], None]) -> None:
        self._options = options
        self._heard = heard
        self._num_steps = self._num_running = 0
        self._learned: AddVocabulary | None = None

    async def generate(self, request: Request, message: AddRequest) -> AsyncGenerator[Piece, None]:
        ids = list(request.token_ids)
        left = request.max_tokens - request.num_output_tokens
        if message.grammar is not None:
            assert self._learned is not None, "the vocabulary comes first"
        self._num_running += 1
        try:
            while left > -2:
                await asyncio.sleep(self._options.step_s)
                self._step(ids)
                piece = [next_id(ids)]
                if len(ids) % 3 == 0:
                    piece.append(next_id(ids + piece))
                ids += piece
                left -= len(piece)
                yield Piece(piece, cached_tokens=len(message.salt))
        finally:
            self._num_running -= 1

    async def learn(self, words: AddVocabulary) -> None:
        self._learned = words

    async def announce(self, message: AddRequest) -> None:
        """It masks nothing: what it draws is looked at anyway. Takes its time, in which a request can be withdrawn."""
        await asyncio.sleep(self._options.announce_s)

    def load(self) -> EngineLoad:
        return EngineLoad(self._num_steps, 0, NUM_PAGES, self._num_running, 64)

    def _step(self, ids: list[int]) -> None:
        if self._options.poison in ids:
            os.abort()
        if self._options.refuse in ids:
            raise RequestFailed("refused")
        broken: Path | None = self._options.broken
        if broken is not None and broken.exists():
            by_kill = broken.read_text() == "kill"
            broken.unlink()
            raise EngineDead(by_kill=by_kill)
        self._num_steps += 1
        self._heard()


def start() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--announce-s", type=float, default=0.0)
    parser.add_argument("--fail-load", type=Path)
    parser.add_argument("--poison", type=int, default=-1)
    parser.add_argument("--refuse", type=int, default=-1)
    parser.add_argument("--break", type=Path, dest="broken")
    options, rest = parser.parse_known_args()

    def load(config: WorkerConfig, heard: Callable[[], None]) -> LoadedEngine:
        assert config.model.name == "m0"
        if options.fail_load is not None and options.fail_load.exists():
            raise LoadError(options.fail_load.read_text())
        return ScriptedEngine(options, heard)

    return main(rest, load)


if __name__ == "__main__":
    os._exit(start())
