"""A long prompt beside others who decode: `python -m benchmarks.long_context [--tokens 100000] [--others 4]`.

The demo model, its context extended by YaRN, in an engine process of its own, asked over gRPC. A few streams write all
the while; their gaps between tokens are taken without the long prompt and with it, from its submission to its first
token. Meanwhile the engine is asked for its statistics again and again: how long its event loop takes to answer, also
while it tokenizes the prompt, and whether free, cached and used pages are all pages. At the end the prompt is sent once
more: found in the prefix cache, it must be answered by the same tokens. Prints one JSON document; exit status 1 where
the books do not balance or the answers differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub
from benchmarks.peers.machine import commit, describe

NATIVE_WINDOW = 4096  # of the demo model
NUM_OUTPUT = 8  # tokens of the long request
TOKENS_A_STREAM = 256
PING_S = 0.02
START_S = 120.0
MESSAGE_BYTES = 64 << 20
WORDS = "the quick brown fox jumps over a lazy dog while three small birds sing about rain and bread"


@asynccontextmanager
async def engine(folder: Path, window: int, threads: int) -> AsyncIterator[EngineStub]:
    """An engine that serves the demo model with this window."""
    factor = max(1, math.ceil(window / NATIVE_WINDOW))
    (folder / "edge.toml").write_text(
        f"[engine]\nnum_threads = {threads}\n"
        '[[models]]\nids = ["long"]\nfamily = "sonnet"\nsource = "demo"\n'
        f'context_window = {window}\nrope_scaling = {{ rope_type = "yarn", factor = {factor} }}\n'
    )
    with _process(folder) as address:
        options = [("grpc.max_receive_message_length", MESSAGE_BYTES)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = EngineStub(channel)
            await asyncio.wait_for(_until_ready(stub), START_S)
            yield stub


@contextmanager
def _process(folder: Path) -> Iterator[str]:
    """Its address."""
    address = f"unix:{folder / 'engine.sock'}"
    command = [sys.executable, "-m", "aiexport_edge.engine", "--config", str(folder / "edge.toml")]
    command += ["--state", str(folder / "state"), "--listen", address]
    with (folder / "engine.log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield address
        finally:
            process.terminate()


async def _until_ready(stub: EngineStub) -> None:
    while True:
        try:
            models = (await stub.ListModels(pb.ListModelsRequest())).models
            if all(model.state == pb.MODEL_READY for model in models):
                return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        await asyncio.sleep(0.05)


class Others:
    """Streams that write, one reply after the other; `gaps` within a reply, in seconds, since `mark`."""

    def __init__(self, stub: EngineStub) -> None:
        self._stub = stub
        self.mark()

    def mark(self) -> None:
        self.gaps: list[float] = []
        self.num_tokens = 0
        self.since = time.perf_counter()

    async def write(self, seed: int) -> None:
        """Until cancelled."""
        rng = random.Random(seed)
        while True:
            ids = [rng.randrange(300, 1900) for _ in range(32)]
            request = pb.GenerateRequest(
                request_id="other",
                model="demo",
                token_ids=pb.TokenIds(ids=ids),
                sampling=pb.SamplingParams(temperature=0, ignore_eos=True),
                max_tokens=TOKENS_A_STREAM,
                tenant=pb.Tenant(id=f"other-{seed}"),
            )
            last = 0.0
            async for event in self._stub.Generate(request):
                if event.WhichOneof("event") == "delta":
                    now = time.perf_counter()
                    self.num_tokens += len(event.delta.token_ids)
                    if last > self.since:
                        self.gaps.append(now - last)
                    last = now

    def report(self) -> dict[str, Any]:
        """Of the time since `mark`."""
        seconds = time.perf_counter() - self.since
        return {
            "seconds": round(seconds, 2),
            "tokens_per_s": round(self.num_tokens / seconds, 1),
            "gaps": len(self.gaps),
            **_milliseconds("gap", self.gaps),
        }


class Pings:
    """Asks for statistics again and again: `delays`, in seconds, and whether the pages are all there."""

    def __init__(self, stub: EngineStub) -> None:
        self._stub = stub
        self.delays: list[float] = []
        self.num_checked = self.num_unbalanced = self.most_used = 0

    async def ask(self) -> None:
        """Until cancelled."""
        while True:
            started = time.perf_counter()
            stats = await self._stub.Stats(pb.StatsRequest())
            self.delays.append(time.perf_counter() - started)
            self.check(stats)
            await asyncio.sleep(PING_S)

    def check(self, stats: pb.StatsResponse) -> None:
        self.num_checked += 1
        self.num_unbalanced += stats.pages_used + stats.pages_cached + stats.pages_free != stats.pages_total
        self.most_used = max(self.most_used, stats.pages_used)

    def take(self) -> dict[str, float]:
        """Delays since it was last asked."""
        delays, self.delays = self.delays, []
        return _milliseconds("answer", delays)


def _milliseconds(name: str, seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {
        f"{name}_p50_ms": round(1e3 * ordered[len(ordered) // 2], 2),
        f"{name}_p99_ms": round(1e3 * ordered[int(0.99 * (len(ordered) - 1))], 2),
        f"{name}_worst_ms": round(1e3 * ordered[-1], 2),
    }


async def long_text(stub: EngineStub, num_tokens: int) -> str:
    """Words of about so many tokens, template included, and not more."""
    rng = random.Random(4)
    choices = WORDS.split()
    words = [rng.choice(choices) for _ in range(1000)]
    chat = _chat(" ".join(words))
    per_word = (await stub.CountTokens(pb.CountTokensRequest(model="demo", chat=chat))).prompt_tokens / 1000
    words = [rng.choice(choices) for _ in range(int(num_tokens / per_word))]
    while True:
        chat = _chat(" ".join(words))
        count = (await stub.CountTokens(pb.CountTokensRequest(model="demo", chat=chat))).prompt_tokens
        if count <= num_tokens:
            return " ".join(words)
        del words[-max(1, int((count - num_tokens) / per_word)) :]


def _chat(text: str) -> pb.Chat:
    return pb.Chat(messages=[pb.Message(role=pb.ROLE_USER, content=[pb.ContentBlock(text=text)])])


async def ask_long(stub: EngineStub, text: str) -> dict[str, Any]:
    """When its parts came, in seconds from its submission, and what it answered."""
    request = pb.GenerateRequest(
        request_id="long",
        model="demo",
        chat=_chat(text),
        sampling=pb.SamplingParams(temperature=0, ignore_eos=True),
        max_tokens=NUM_OUTPUT,
        tenant=pb.Tenant(id="long"),
    )
    outcome: dict[str, Any] = {"ids": []}
    started = time.perf_counter()
    async for event in stub.Generate(request):
        seconds = round(time.perf_counter() - started, 3)
        match event.WhichOneof("event"):
            case "accepted":
                outcome |= {"accepted_s": seconds, "prompt_tokens": event.accepted.prompt_tokens}
            case "started":
                outcome["cached_tokens"] = event.started.cached_tokens
            case "delta":
                outcome.setdefault("first_token_s", seconds)
                outcome["ids"] += event.delta.token_ids
    return outcome


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One run."""
    window = options.tokens + 1024
    document: dict[str, Any] = {
        "machine": describe(),
        "commit": commit(),
        "load_average_before": [round(value, 2) for value in os.getloadavg()],
        "threads": options.threads,
        "others": options.others,
        "window": window,
    }
    with tempfile.TemporaryDirectory() as folder:
        async with engine(Path(folder), window, options.threads) as stub, asyncio.TaskGroup() as tasks:
            text = await long_text(stub, options.tokens)
            others, pings = Others(stub), Pings(stub)
            running = [tasks.create_task(others.write(seed)) for seed in range(options.others)]
            running.append(tasks.create_task(pings.ask()))
            await asyncio.sleep(min(2.0, options.seconds))
            others.mark()
            pings.take()
            await asyncio.sleep(options.seconds)
            document["without"] = others.report() | pings.take()
            others.mark()
            first = await ask_long(stub, text)
            document["with"] = others.report() | pings.take()
            again = await ask_long(stub, text)
            for task in running:
                task.cancel()
            await asyncio.wait(running)
            while (stats := await stub.Stats(pb.StatsRequest())).running or stats.waiting or stats.pages_used:
                pings.check(stats)
                await asyncio.sleep(PING_S)
            pings.check(stats)
    document["long"] = {key: value for key, value in first.items() if key != "ids"}
    document["long_again"] = {key: value for key, value in again.items() if key != "ids"}
    document["same_answer"] = first["ids"] == again["ids"] and len(first["ids"]) == NUM_OUTPUT
    document["pages"] = {
        "total": stats.pages_total,
        "most_used": pings.most_used,
        "checked": pings.num_checked,
        "unbalanced": pings.num_unbalanced,
        "used_at_the_end": stats.pages_used,
    }
    document["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
    return document


def main(argv: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.long_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="of the long prompt")
    parser.add_argument("--others", type=int, default=4, help="streams that write meanwhile")
    parser.add_argument("--seconds", type=float, default=15.0, help="to measure the others without it")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    document = asyncio.run(measure(options))
    text = json.dumps(document, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    balanced = not document["pages"]["unbalanced"] and not document["pages"]["used_at_the_end"]
    return 0 if balanced and document["same_answer"] else 1


if __name__ == "__main__":
    sys.exit(main())
