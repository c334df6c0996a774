"""Where a step goes on a CPU: the whole step beside its packed products alone, in one run, paired.

    python -m benchmarks.cpu_decode MODEL_DIRECTORY [--streams 1 4 16] [--context 128] [--quantize none int8 int4]
                                                    [--prompt 128 512]

A step is the runner's, from plan to drawn ids: decodes of so many streams, or a whole prompt. The products are the same
calls on inputs of the same shapes, recorded and run in the same way, one after the other with nothing between. Steps
and products take turns, so that what else the machine does meets both; medians. A model of real shapes:
`python -m benchmarks.peers.model DIRECTORY`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiexport_edge.kernels import threads

os.environ.update(threads.ENVIRONMENT)  # before torch is loaded

import torch

from aiexport_edge.engine.core.loading import make_runner
from aiexport_edge.engine.core.plan import Chunk, ModelPlan, StepPlan
from aiexport_edge.engine.core.protocol import CoreConfig, CoreModel, Priority, Sampling
from aiexport_edge.engine.core.request import Request
from aiexport_edge.engine.core.runner import Runner
from aiexport_edge.engine.models.decoder import Decoder, Mlp
from aiexport_edge.engine.models.loader import load_model
from aiexport_edge.kernels.large_pages import collapse
from aiexport_edge.kernels.linear import PackedLinear
from benchmarks.peers.machine import commit, describe

WINDOW = 4096
STEP_TOKENS = 512
PAGE_SLACK = 64  # tokens: a page that is not full, and the one that nobody has
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)


def make_requests(runner: Runner, streams: int, context: int, shared: int = 0) -> list[Request]:
    """Requests that have computed `context` tokens each, whose next step is a decode; in pages of their own but for
    those that the first `shared` tokens fill."""
    per_request = -(-(context + 1) // runner.tokens_per_page[0])
    common = list(range(1, 1 + shared // runner.tokens_per_page[0]))
    return [
        Request(
            handle=number,
            model=0,
            token_ids=[(7 * number + 13 * position) % 1000 + 10 for position in range(context + 1)],
            num_prompt_tokens=context,
            max_tokens=1 << 30,
            stop_ids=frozenset(),
            sampling=GREEDY,
            tenant="",
            weight=1.0,
            salt=b"",
            priority=Priority.INTERACTIVE,
            arrival=number,
            pages=[*common, *range(1 + number * per_request + len(common), 1 + (number + 1) * per_request)],
        )
        for number in range(streams)
    ]


def products_alone(decoder: Decoder, rows: int, drawn: int) -> Callable[[], None]:
    """All products of one step, one after the other: the layers' of `rows` tokens, the head's of `drawn`."""
    products: list[PackedLinear] = []
    for layer in decoder.layers:
        assert isinstance(layer.mlp, Mlp)
        for product in (layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down):
            assert isinstance(product, PackedLinear)
            products.append(product)
    head = decoder.head
    inputs = {product.in_features: torch.randn(rows, product.in_features).to(product.dtype) for product in products}
    hidden = torch.randn(drawn, head.in_features).to(head.dtype)

    def run() -> None:
        for product in products:
            product(inputs[product.in_features])
        head(hidden, out_dtype=torch.float32)

    if not all(product.is_own for product in (*products, head)):
        return run
    from aiexport_edge.kernels.cpu.program import Arena, Program

    layers_bytes = rows * 4 * (max(product.out_features for product in products) + max(inputs))
    program = Program(Arena(8 * (layers_bytes + drawn * 4 * (head.out_features + head.in_features)) + (1 << 20)))
    with program.recording():
        run()

    def replay() -> None:
        assert len(hidden) == drawn  # the program holds the addresses only of this and of `inputs`
        assert inputs
        program.run()

    return replay


def milliseconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def measure(
    runner: Runner, decoder: Decoder, chunks: list[Chunk], products: Callable[[], None], repeats: int
) -> dict[str, float]:
    """Medians of the step that computes these chunks and of the products, in turns."""
    plan = StepPlan([ModelPlan(0, chunks)])
    for _ in range(3):
        runner.step(plan)
        products()
    pairs = [(milliseconds(lambda: runner.step(plan)), milliseconds(products)) for _ in range(repeats)]
    step, alone = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {
        "step_ms": round(step, 2),
        "products_ms": round(alone, 2),
        "step_per_products": round(statistics.median(whole / part for whole, part in pairs), 3),
    }


def measure_decodes(
    runner: Runner, decoder: Decoder, streams: int, context: int, shared: int, repeats: int
) -> dict[str, Any]:
    requests = make_requests(runner, streams, context, shared)
    with torch.inference_mode():
        products = products_alone(decoder, streams, streams)
        chunks = [Chunk(request, context, 1, True) for request in requests]
        times = measure(runner, decoder, chunks, products, repeats)
    rates = {
        "tokens_per_s": round(1e3 * streams / times["step_ms"], 1),
        "gb_per_s": round(runner.weight_bytes[0] / times["products_ms"] / 1e6, 1),
    }
    return {"streams": streams, "context": context, "shared": shared} | times | rates


def measure_prompt(runner: Runner, decoder: Decoder, prompt: int, repeats: int) -> dict[str, Any]:
    [request] = make_requests(runner, 1, prompt - 1)
    with torch.inference_mode():
        products = products_alone(decoder, prompt, 1)
        times = measure(runner, decoder, [Chunk(request, 0, prompt, True)], products, repeats)
    return {"prompt": prompt} | times | {"tokens_per_s": round(1e3 * prompt / times["step_ms"], 1)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_decode", description="Decode steps on a CPU.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[128])
    parser.add_argument("--shared", type=int, nargs="+", default=[0], help="tokens of the context that all share")
    parser.add_argument("--prompt", type=int, nargs="*", default=[], help=f"prompts of at most {STEP_TOKENS} tokens")
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    threads.set_num_threads(options.threads)
    document: dict[str, Any] = {"machine": describe(), "commit": commit(), "threads": options.threads, "rows": []}
    document["load_average"] = [round(value, 2) for value in os.getloadavg()]

    def add(row: dict[str, Any]) -> None:
        document["rows"].append({"quantize": quantize} | row)
        print(json.dumps(document["rows"][-1]), flush=True)

    for quantize in options.quantize:
        started = time.perf_counter()
        model = load_model(options.model, name="model", quantize=quantize, context_window=WINDOW)
        entry = CoreModel("model", str(options.model), "auto", WINDOW, False, "", quantize=quantize)
        tokens = max(options.streams) * (max([*options.context, *options.prompt]) + PAGE_SLACK)
        pool_bytes = tokens * model.config.kv_bytes_per_token(model.dtype.itemsize)
        config = CoreConfig([entry], "cpu", 0, pool_bytes, max(options.streams), STEP_TOKENS, options.threads, 0.0)
        runner = make_runner(config, [model], torch.device("cpu"), None)
        runner.memory.bytes.zero_()  # what was never written is one page of the system's, and lies in a cache
        collapse()  # as a core does once it serves
        document[f"load_s_{quantize}"] = round(time.perf_counter() - started, 2)
        for streams in options.streams:
            for context in options.context:
                for shared in options.shared:
                    if shared and (shared >= context or streams == 1):
                        continue
                    add(measure_decodes(runner, model.decoder, streams, context, shared, options.repeats))
        for prompt in options.prompt:
            add(measure_prompt(runner, model.decoder, prompt, options.repeats))
        del runner, model
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
