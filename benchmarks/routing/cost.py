"""What a choice costs in a shim, by the size of the prompt: CPU time of the hashes and of the choice, four engines."""

from __future__ import annotations

import time

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.shim.engines.prefixes import trail
from aiexport_edge.shim.engines.routing import Candidate, Router

REPEATS = 300
PROMPTS = {"100 characters": (100, 1), "10,000": (10_000, 1), "10,000 in 50 messages": (10_000, 50)}
PROMPTS |= {"1,000,000": (1_000_000, 1), "1,000,000 in 1,000 messages": (1_000_000, 1000)}


def measure() -> dict[str, float]:
    """Microseconds a request."""
    found = {}
    candidates = [Candidate(f"10.0.0.{index}:1", index, 0) for index in range(4)]
    for name, (chars, messages) in PROMPTS.items():
        text = ("lorem ipsum " * (chars // messages // 12 + 1))[: chars // messages]
        message = pb.Message(role=pb.ROLE_USER, content=[pb.ContentBlock(text=text)])
        request = pb.GenerateRequest(model="m", chat=pb.Chat(messages=[message] * messages))
        router = Router()
        began = time.process_time()
        for _ in range(REPEATS):
            seen = trail(request)
            router.placed(seen, router.choose(seen, candidates).index)
        found[name] = round(1e6 * (time.process_time() - began) / REPEATS, 1)
    return found
