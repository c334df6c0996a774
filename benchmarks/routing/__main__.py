"""`python -m benchmarks.routing TRACE.csv [--requests 240] [--streams 12] [--vllm PYTHON] [--output FILE.json]`

One tier of three engines with the demo model on this machine, real processes; conversations made of a real trace
(`conversations.py` says how); each routing policy in turn, on engines that start empty. Then the first
`--simulated` requests of the trace, at their full lengths, through the same router with engines that are a queue and a
page cache (`simulation.py`). With `--vllm`, the third engine has the vLLM backend, run by that interpreter.

What counts is the share of prompt tokens that an engine had in its cache: times are those of three engines that share
one machine's processors.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aiexport_edge.proto.config import source_directory
from aiexport_edge.shim.engines.routing import Policy
from benchmarks.peers import machine
from benchmarks.routing import conversations, cost, simulation
from benchmarks.routing.installation import running
from benchmarks.routing.replay import Replay

ENGINE = """
[engine]
num_threads = 1
pool_bytes = "{pool}"
"""
MODEL = """
[[models]]
ids = ["apex-haiku-4-20250401"]
family = "haiku"
source = "{source}"
"""
VLLM = """
backend = "vllm"
[models.vllm]
python = "{python}"
kv_cache_bytes = "{pool}"
"""
SIMULATED_ENGINES, SIMULATED_PAGES = 3, 32_768  # half a million tokens each
SCALE, MAX_PROMPT, MAX_OUTPUT = 0.6, 1600, 16  # of the trace's lengths, for a model of 4,096 tokens


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__)
    parser.add_argument("trace", type=Path, help="AzureLLMInferenceTrace_conv.csv")
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--streams", type=int, default=12)
    parser.add_argument("--pool", default="96MiB", help="page pool of each engine (default: 96MiB)")
    parser.add_argument("--simulated", type=int, default=6000)
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="interpreter of an environment with vLLM")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    document: dict[str, Any] = {
        "machine": machine.describe(),
        "commit": machine.commit(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "trace": args.trace.name,
        "engines": _measured(args),
        "simulation": _simulated(args),
        "router_us_by_prompt": cost.measure(),
    }
    text = json.dumps(document, indent=1)
    if args.output:
        args.output.write_text(text + "\n")
    print(text)
    return 0


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    turns = conversations.read(
        args.trace, scale=SCALE, max_prompt=MAX_PROMPT, max_output=MAX_OUTPUT, number=args.requests
    )
    configs, model = [ENGINE.format(pool=args.pool)] * 3, ""
    if args.vllm is not None:
        model = MODEL.format(source=source_directory("demo"))
        native = ENGINE.format(pool=args.pool) + model
        configs = [native, native, native + VLLM.format(python=args.vllm.absolute(), pool=args.pool)]
    found: dict[str, Any] = {
        "backends": ["native", "native", "native" if args.vllm is None else "vllm"],
        "streams": args.streams,
        "pool": args.pool,
        "further_turns": sum(turn.index > 0 for turn in turns),
    }
    for policy in Policy:
        print(f"{policy.value} …", file=sys.stderr)
        with (
            tempfile.TemporaryDirectory() as folder,
            running(Path(folder) / "r", configs, policy.value, model) as installation,
        ):
            found[policy.value] = asyncio.run(Replay(installation, turns, streams=args.streams).run())
            print(json.dumps(found[policy.value]), file=sys.stderr)
    return found


def _simulated(args: argparse.Namespace) -> dict[str, Any]:
    turns = conversations.read(args.trace, scale=1, max_prompt=8000, max_output=1000, number=args.simulated)
    found: dict[str, Any] = {
        "requests": len(turns),
        "further_turns": sum(turn.index > 0 for turn in turns),
        "engines": SIMULATED_ENGINES,
        "pages_of_each": SIMULATED_PAGES,
        "page_tokens": simulation.PAGE_TOKENS,
    }
    one = simulation.run(turns, Policy.PREFIX, num_engines=1, pages=1 << 40)
    found["hit_rate_of_one_endless_cache"] = round(one["hit_rate"], 4)
    for policy in Policy:
        print(f"simulation: {policy.value} …", file=sys.stderr)
        run = simulation.run(turns, policy, num_engines=SIMULATED_ENGINES, pages=SIMULATED_PAGES)
        found[policy.value] = {key: round(value, 4) for key, value in run.items()}
    return found


if __name__ == "__main__":
    sys.exit(main())
