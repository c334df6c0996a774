"""The whole trace through the router itself, with engines that are a queue, a speed and a page cache.

No tokens are computed: an engine takes so long for a prompt's tokens that it has not cached and for each output token,
and keeps the pages of the prompts it has seen, the least recently used forgotten first. What is real is the router, the
hashes of the prompts' texts, and the arrival times and lengths.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines.prefixes import trail
from aiexport_edge.shim.engines.routing import Candidate, Policy, Router
from benchmarks.routing.conversations import SYSTEM_TOKENS, Texts, Turn

PAGE_TOKENS = 16
PREFILL_S = 1 / 8000  # a token of a prompt, one after the other
DECODE_S = 0.025  # an output token, all at once


@dataclass
class Engine:
    """`pages` are named by what stands before and in them."""

    capacity: int
    pages: OrderedDict[tuple[object, ...], None] = field(default_factory=OrderedDict)
    busy_until: float = 0.0
    running: int = 0

    def admit(self, names: Sequence[tuple[object, ...]]) -> int:
        """Tokens of the prompt that were there; all of it is there afterwards."""
        found = 0
        for name in names:
            if name not in self.pages:
                break
            found += 1
        for name in names:
            self.pages[name] = None
            self.pages.move_to_end(name)
        while len(self.pages) > self.capacity:
            self.pages.popitem(last=False)
        return found * PAGE_TOKENS


def run(turns: Sequence[Turn], policy: Policy, *, num_engines: int, pages: int, pace: float = 1.0) -> dict[str, float]:
    """One policy over all turns, arriving `pace` times as fast as they did."""
    router = Router(policy)
    engines = [Engine(pages) for _ in range(num_engines)]
    ends: list[tuple[float, int]] = []
    texts, said = Texts(), dict[int, list[pb.Message]]()
    prompts = cached = 0
    waits: list[float] = []
    peaks: list[float] = []
    spent = 0.0
    for turn in turns:
        now = turn.at / pace
        while ends and ends[0][0] <= now:
            engines[heapq.heappop(ends)[1]].running -= 1
        request = _request(turn, texts, said)
        before = time.process_time()
        found = trail(request)
        candidates = [Candidate(f"10.0.0.{index}:1", index, engine.running) for index, engine in enumerate(engines)]
        choice = router.choose(found, candidates)
        router.placed(found, choice.index)
        spent += time.process_time() - before
        engine = engines[choice.index]
        hit = min(engine.admit(_pages(turn)), turn.prompt - 1)
        prompts += turn.prompt
        cached += hit
        engine.busy_until = max(engine.busy_until, now) + (turn.prompt - hit) * PREFILL_S
        waits.append(engine.busy_until - now)
        engine.running += 1
        heapq.heappush(ends, (engine.busy_until + turn.output * DECODE_S, choice.index))
        running = [each.running for each in engines]
        if sum(running) >= 4 * num_engines:
            peaks.append(max(running) / statistics.fmean(running))
    waits.sort()
    return {
        "hit_rate": cached / prompts,
        "first_token_p50_ms": 1000 * waits[len(waits) // 2],
        "first_token_p99_ms": 1000 * waits[len(waits) * 99 // 100],
        "load_max_to_mean": statistics.fmean(peaks) if peaks else 1.0,
        "router_us_per_request": 1e6 * spent / len(turns),
    }


def _request(turn: Turn, texts: Texts, said: dict[int, list[pb.Message]]) -> pb.GenerateRequest:
    messages = said.setdefault(turn.conversation, [])
    if not messages:
        messages.append(_message(pb.ROLE_SYSTEM, texts.system(turn.system)))
    messages.append(_message(pb.ROLE_USER, texts.user(turn)))
    request = pb.GenerateRequest(model="m", chat=pb.Chat(messages=messages), tenant=pb.Tenant(cache_salt=b"salt"))
    messages.append(_message(pb.ROLE_ASSISTANT, texts.reply(turn)))
    return request


def _message(role: pb.Role, text: str) -> pb.Message:
    return pb.Message(role=role, content=[pb.ContentBlock(text=text)])


def _pages(turn: Turn) -> list[tuple[object, ...]]:
    """Names of a prompt's full pages: those of a system prompt are everybody's, the others their conversation's."""
    shared = SYSTEM_TOKENS // PAGE_TOKENS
    system: list[tuple[object, ...]] = [("system", turn.system, page) for page in range(shared)]
    return system + [(turn.conversation, page) for page in range(shared, turn.prompt // PAGE_TOKENS)]
