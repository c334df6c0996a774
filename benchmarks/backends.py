"""The native backend and vLLM side by side: one model, one engine process, the same requests in turn.

    python -m benchmarks.backends [MODEL] --vllm-python PYTHON [--streams 1 4 16] [--prompt 128] [--tokens 64]
                                  [--repeats 3] [--output FILE.json]

Each backend is first started alone: seconds from the spawn of the engine to a model that serves, and to the first
token of the first request; memory of all its processes then (what several share counts once). Then one engine serves
the model by both, and every cell is measured on one and on the other right after, `repeats` times over: medians.
Requests go over gRPC with prompts of random ids, so no prefix is found again; they are greedy and write `tokens` each.
Prints one JSON document, with the share of the cores that others used meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from aiexport_edge.proto import engine_pb2 as pb
from aiexport_edge.proto.engine_pb2_grpc import EngineStub
from benchmarks.peers.machine import OthersWatch, commit, describe, pss_bytes

BACKENDS = ("native", "vllm")
PATIENCE_S = 600.0
ENTRY = '[[models]]\nids = ["{backend}"]\nfamily = "opus"\nsource = "{source}"\nbackend = "{backend}"\n'
OPTIONS = '[models.vllm]\npython = "{python}"\nmemory_share = 0.4\nkv_cache_bytes = "1GiB"\n'


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine; `names` are its models', by backend."""

    pid: int
    stub: EngineStub
    names: dict[str, str]
    start_s: float
    vocab_size: int


@contextmanager
def engine(backends: tuple[str, ...], options: argparse.Namespace) -> Iterator[Engine]:
    """With the model on each of `backends`, all ready."""
    source = options.model if options.model == "demo" else str(Path(options.model).resolve())
    with tempfile.TemporaryDirectory() as folder:
        config, address = Path(folder) / "aiexport-edge.toml", f"unix:{folder}/engine.sock"
        entries = [
            ENTRY.format(backend=backend, source=source)
            + ("deterministic = false\n" if backend == "native" else OPTIONS.format(python=options.vllm_python))
            for backend in backends
        ]
        engine_table = f'[engine]\nnum_threads = {options.threads}\npool_bytes = "1GiB"\n'
        config.write_text(engine_table + "".join(entries))
        began = time.monotonic()
        command = [sys.executable, "-m", "aiexport_edge.engine", "--config", str(config), "--listen", address]
        process = subprocess.Popen([*command, "--state", f"{folder}/state"], stderr=subprocess.DEVNULL)
        try:
            with grpc.insecure_channel(address) as channel:
                stub = EngineStub(channel)
                names = _await(stub, process)
                start_s = time.monotonic() - began
                yield Engine(
                    process.pid,
                    stub,
                    dict(zip(backends, names, strict=True)),
                    start_s,
                    _vocab_size(source),
                )
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _await(stub: EngineStub, process: subprocess.Popen[bytes]) -> list[str]:
    """The models' names when all are ready."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the engine ended with {process.returncode}; start it by hand to see why")
        try:
            models = stub.ListModels(pb.ListModelsRequest(), timeout=30, wait_for_ready=True).models
        except grpc.RpcError:
            continue
        if failed := [model.message for model in models if model.state == pb.MODEL_FAILED]:
            raise RuntimeError(failed[0])
        if all(model.state == pb.MODEL_READY for model in models):
            return [model.name for model in models]
        time.sleep(0.02)
    raise RuntimeError(f"the models are not ready after {PATIENCE_S:.0f} s")


def _vocab_size(source: str) -> int:
    from aiexport_edge.proto.config import source_directory

    size: int = json.loads((source_directory(source) / "config.json").read_text())["vocab_size"]
    return size


def generate(running: Engine, backend: str, prompt: list[int], num_tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and to the end, and the tokens of one request."""
    request = pb.GenerateRequest(
        model=running.names[backend],
        token_ids=pb.TokenIds(ids=prompt),
        sampling=pb.SamplingParams(temperature=0, ignore_eos=True),
        max_tokens=num_tokens,
    )
    began, first, count = time.monotonic(), 0.0, 0
    for event in running.stub.Generate(request, timeout=PATIENCE_S):
        if event.WhichOneof("event") == "delta":
            first = first or time.monotonic() - began
            count = event.delta.output_tokens
    return first, time.monotonic() - began, count


def cell(
    running: Engine, backend: str, streams: int, options: argparse.Namespace, rng: random.Random
) -> dict[str, float]:
    """So many requests at once, once."""
    prompts = [[rng.randrange(10, running.vocab_size - 10) for _ in range(options.prompt)] for _ in range(streams)]
    began = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        done = list(pool.map(lambda prompt: generate(running, backend, prompt, options.tokens), prompts))
    seconds = time.monotonic() - began
    assert all(count == options.tokens for _, _, count in done)
    return {
        "tokens_per_s": sum(count for _, _, count in done) / seconds,
        "first_token_ms": 1000 * statistics.median(first for first, _, _ in done),
        "between_tokens_ms": 1000 * statistics.median((end - first) / (count - 1) for first, end, count in done),
    }


def start_alone(backend: str, options: argparse.Namespace, rng: random.Random) -> dict[str, float]:
    with engine((backend,), options) as running:
        watch = OthersWatch(running.pid)
        prompt = [rng.randrange(10, running.vocab_size - 10) for _ in range(options.prompt)]
        first, _, _ = generate(running, backend, prompt, 8)
        return {
            "start_s": round(running.start_s, 2),
            "first_request_first_token_s": round(first, 3),
            "memory_mib": pss_bytes(running.pid) >> 20,
            "others_share": round(watch.share(), 2),
        }


def side_by_side(options: argparse.Namespace, rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    with engine(BACKENDS, options) as running:
        for backend in BACKENDS:
            cell(running, backend, max(options.streams), options, rng)  # what is compiled at first use
        for streams in options.streams:
            watch, found = OthersWatch(running.pid), {backend: list[dict[str, float]]() for backend in BACKENDS}
            for _ in range(options.repeats):
                for backend in BACKENDS:
                    found[backend].append(cell(running, backend, streams, options, rng))
            row: dict[str, Any] = {"streams": streams, "others_share": round(watch.share(), 2)}
            for backend, runs in found.items():
                row[backend] = {name: round(statistics.median(run[name] for run in runs), 1) for name in runs[0]}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--vllm-python", type=Path, required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.vllm_python = options.vllm_python.absolute()
    rng = random.Random(0)
    starts = {backend: start_alone(backend, options, rng) for backend in BACKENDS}
    print(json.dumps(starts), file=sys.stderr)
    document = {
        "machine": describe(),
        "commit": commit(),
        "model": options.model if options.model == "demo" else Path(options.model).name,
        "prompt_tokens": options.prompt,
        "output_tokens": options.tokens,
        "repeats": options.repeats,
        "threads": options.threads,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "alone": starts,
        "side_by_side": side_by_side(options, rng),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
