"""What is measured of a running server: cells of prompt and streams, repeated as time allows, with their noise."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.client import Reply, stream
from benchmarks.peers.machine import OthersWatch
from benchmarks.peers.prompts import Prompts
from benchmarks.peers.servers import Server

OUTPUT_TOKENS = 64
REPEATS = 3
ENOUGH_S = 12.0  # a cell that has taken this long is not repeated again


@dataclass(frozen=True, slots=True)
class Cell:
    """Prompts of `prompt_tokens`, the first `shared_tokens` of them the same in all, on `streams` at once."""

    prompt_tokens: int
    shared_tokens: int
    streams: int

    @property
    def key(self) -> str:
        shared = f" ({self.shared_tokens} shared)" if self.shared_tokens else ""
        return f"{self.prompt_tokens}{shared} x {self.streams}"


CELLS = [
    Cell(prompt, shared, streams) for prompt, shared in ((128, 0), (1500, 0), (1500, 1000)) for streams in (1, 4, 16)
]


@dataclass(frozen=True, slots=True)
class Round:
    """All streams of a cell once."""

    replies: list[Reply]

    @property
    def tokens_per_s(self) -> float:
        seconds = max(reply.texts[-1] for reply in self.replies) - min(reply.started for reply in self.replies)
        return sum(reply.num_tokens for reply in self.replies) / seconds

    @property
    def first_p50_ms(self) -> float:
        return 1e3 * statistics.median(reply.first_s for reply in self.replies)

    @property
    def gaps_ms(self) -> list[float]:
        return [1e3 * gap for reply in self.replies for gap in reply.gaps_s]


async def ask(server: Server, prompt: str, max_tokens: int = OUTPUT_TOKENS) -> Reply:
    """One request."""
    return await stream(server.port, server.path, server.headers(), server.body(prompt, max_tokens), server.read)


async def first_token_s(server: Server, prompt: str, patience_s: float) -> float:
    """Seconds from the server's start to the first token of a request that is sent as soon as one is taken."""
    end = server.started + patience_s
    while time.perf_counter() < end:
        if server.listening():
            try:
                reply = await ask(server, prompt, 4)
                return reply.texts[0] - server.started
            except (OSError, RuntimeError, ValueError):  # it listens, but is not ready
                pass
        await asyncio.sleep(0.02)
    raise RuntimeError(f"{server.name} was not ready in {patience_s:.0f} s; see {server.log}")


async def measure(server: Server, cell: Cell, prompts: Prompts) -> dict[str, Any]:
    """The cell's figures: medians over its rounds, each with its spread, (largest - smallest) / median."""
    shared = ""
    if cell.shared_tokens:
        shared = prompts.shared_part(cell.shared_tokens)
        await ask(server, prompts.text(cell.prompt_tokens, begin=shared), 2)
    rounds: list[Round] = []
    watch = OthersWatch(server.pid)
    began = time.perf_counter()
    for _ in range(REPEATS):
        texts = [prompts.text(cell.prompt_tokens, begin=shared) for _ in range(cell.streams)]
        rounds.append(Round(list(await asyncio.gather(*(ask(server, text) for text in texts)))))
        if time.perf_counter() - began > ENOUGH_S:
            break
    wrong = {reply.num_tokens for round_ in rounds for reply in round_.replies} - {OUTPUT_TOKENS}
    gaps = sorted(itertools.chain.from_iterable(round_.gaps_ms for round_ in rounds))
    speeds = [round_.tokens_per_s for round_ in rounds]
    firsts = [round_.first_p50_ms for round_ in rounds]
    return {
        "tokens_per_s": round(statistics.median(speeds), 1),
        "tokens_per_s_spread": spread(speeds),
        "first_token_p50_ms": round(statistics.median(firsts), 1),
        "first_token_spread": spread(firsts),
        "gap_p50_ms": round(statistics.median(gaps), 2),
        "gap_p99_ms": round(gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))], 2),
        "rounds": len(rounds),
        "others_cpu_share": round(watch.share(), 3),
        **({"output_tokens_not_asked_for": sorted(wrong)} if wrong else {}),
    }


def spread(values: list[float]) -> float | None:
    """None where there is but one."""
    return round((max(values) - min(values)) / statistics.median(values), 3) if len(values) > 1 else None
